"""Chat templates yield the text of transformers' `apply_chat_template` or an error with a hint, within time and memory limits.

The oracle for text and refusal is transformers itself, on published templates (`data/chat_templates`), on those in its own
package, and on short ones for single features.
"""

import ast
import gc
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from headrace.checkpoint import open_checkpoint
from headrace.errors import CheckpointError, HeadraceError, UsageError
from headrace.model.tokenizer import Tokenizer
from headrace.units import GIB
from support.bounded import FINE, faults, refusal, verdict
from support.zoo.scripted import USER_DEFINED, byte_level, write_scripted

BOS, EOS = "<s>", "</s>"
TEXT = 'it\'s <b> & 안녕 "q"\n'
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"unit": "c", "city": "Zürich & <b>"}},
}
IN_WORDS = {**CALL, "function": {"name": "get_weather", "arguments": '{"unit": "c", "city": "Zürich & <b>"}'}}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": '{"t": "7 <b>"}'}


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Exclude the objects of torch and transformers from the garbage collection that each new Tokenizer runs."""
    gc.freeze()
    yield
    gc.unfreeze()


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one message": [user(TEXT)],
    "several turns": [user("a"), assistant("b"), user(" c \n")],
    "a system message": [{"role": "system", "content": "be <kind>"}, user("a")],
    "thoughts in the history": [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c"), assistant("d"), user("e")],
    "a tool call": [user("w?"), assistant("", tool_calls=[CALL]), RESULT],
    "a tool call without content": [user("w?"), {"role": "assistant", "tool_calls": [CALL]}, RESULT, assistant("7"), user("a")],
    "a tool call whose arguments are text": [user("w?"), assistant("", tool_calls=[IN_WORDS]), RESULT],
    "two tool calls": [user("w?"), assistant("x", tool_calls=[CALL, {**CALL, "id": "call00002"}]), RESULT, RESULT],
    "reasoning_content": [user("a"), assistant("b", reasoning_content="hm"), user("c")],
    "reasoning under its other name": [user("a"), assistant("b", reasoning="hm"), user("c")],
    "thinking": [user("a"), assistant("b", thinking="hm"), user("c")],
    "content in parts": [user([{"type": "text", "text": "hi <b>"}])],
    "a developer message": [{"role": "developer", "content": "d"}, user("a")],
    "two user messages": [user("a"), user("b")],
    "content that is null": [user("a"), assistant(None), user("c")],
    "keys that are null": [user("a"), assistant("b", tool_calls=None, reasoning_content=None), user("c")],
    "a system message in the middle": [user("a"), {"role": "system", "content": "s"}, user("b")],
    "an unknown role": [{"role": "nobody", "content": "x"}, user("a")],
    "ends with the assistant": [user("a"), assistant("b")],
}  # fmt: skip

# One feature each. transformers' result is the expected one.
FEATURES = {
    "tojson": "{{ messages | tojson }}",
    "tojson of a text": "{{ messages[0]['content'] | tojson }}",
    "tojson joined with text": "{{ '<tool>' + (messages[0]['content'] | tojson) + '</tool>' }}",
    "tojson is no markup": (
        "{{ ((messages[0] | tojson) ~ '<b>') | length }}{{ '<' ~ (1 | tojson) }}{{ ('<' | tojson) + '&' }}"
    ),
    "tojson keeps the order of keys": "{{ {'b': 1, 'a': {'d': 1, 'c': 2}} | tojson }}",
    "tojson, sorted": "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
    "tojson, indented": "{{ {'a': [messages[0]['content']]} | tojson(indent=4) }}",
    "tojson, indented by position": "{{ {'a': 1} | tojson(true, 2) }}",
    "tojson with separators": "{{ {'b': 1, 'a': [1, 2]} | tojson(separators=(',', ':')) }}",
    "tojson in ASCII": "{{ messages[0]['content'] | tojson(ensure_ascii=true) }}",
    "tojson not in ASCII": "{{ messages[0]['content'] | tojson(ensure_ascii=False) }}",
    "tojson of none": "{{ none | tojson }} {{ tools | tojson }} {{ 1.5e300 | tojson }} {{ true | tojson }}",
    "tojson of what is undefined": "{{ nothing | tojson }}",
    "tojson of infinity": "{{ (1e308 * 10) | tojson }}",
    "tojson of a tuple": "{{ (1, 'a') | tojson }}",
    "tojson of a namespace": "{{ namespace(a=1) | tojson }}",
    "tojson with an unknown option": "{{ 1 | tojson(foo=2) }}",
    "tools are none": "{{ tools is none }} {{ tools is defined }} {{ tools }} {% if not tools %}none{% endif %}",
    "documents are none": "{{ documents is none }} {{ documents is defined }}",
    "special tokens": (
        "{{ bos_token }}|{{ eos_token }}|{{ bos_token is defined }}|{{ unk_token is defined }}|{{ pad_token }}"
    ),
    "what is undefined": "{{ enable_thinking is defined }}{{ nothing }}{{ messages[0].nothing }}{{ xml_tools }}",
    "undefined and its attributes": "{{ nothing.more }}",
    "add_generation_prompt": "{{ add_generation_prompt }} {{ continue_final_message is defined }}",
    "strftime_now": "{{ strftime_now('%Y') }} {{ strftime_now is defined }}",
    "strftime_now of a number": "{{ strftime_now(3) }}",
    "raise_exception": "{{ raise_exception('Conversation roles must alternate <b>') }}",
    "raise_exception when not reached": "{% if false %}{{ raise_exception('no') }}{% endif %}yes",
    "break and continue": (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}"
        "{{ i }}{% endfor %}"
    ),
    "generation": "a{% generation %}{{ messages[0].content }}\n {%- endgeneration %}b",
    "generation trims": "a\n  {% generation %}\n  b\n  {% endgeneration %}\n  c",
    "generation has its own scope": "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}[{{ x }}]",
    "generation in a loop": (
        "{% for m in messages %}{% set n = loop.index %}{% generation %}{{ n }}{{ m.role }}{{ loop.last }}"
        "{% endgeneration %}{% endfor %}"
    ),
    "break out of generation": "{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
    "macros": "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ kwargs }}{{ varargs }}{% endmacro %}{{ f(1, 3, 4, c=5) }}",
    "a macro with a caller": "{% macro f() %}[{{ caller('x') }}]{% endmacro %}{% call(v) f() %}{{ v }}{% endcall %}",
    "a recursive macro": "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(20) }}",
    "a recursive loop": (
        "{% for k in [[1, [2]], 3] recursive %}{% if k is iterable %}({{ loop(k) }}){% else %}{{ k }}{% endif %}"
        "{% endfor %}"
    ),
    "white space is trimmed": "a\n   {% if true %}\n   b\n   {% endif %}\nc\n",
    "white space control": "a  {%- if true -%}  b  {%- endif -%}  c {#- x -#} d",
    "the last line break": "a\n",
    "two last line breaks": "a\n\n",
    "line ends of Windows": "a\r\n{% if true %}\r\nb\r\n{% endif %}\r\n",
    "namespaces": (
        "{% set ns = namespace(a=1, b='x') %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}"
        "{{ ns.a }}{{ ns.b }}{{ ns.c }}"
    ),
    "names of a namespace with an underscore": "{% set ns = namespace(a=1) %}{% set ns._b = 2 %}{{ ns._b }}",
    "a namespace made of one with an underscore": "{% set ns = namespace(**{'_a': 1}) %}{{ ns.a }}",
    "dict": "{{ dict(a=1) }}{{ dict([('b', 2)]) }}{{ dict.fromkeys('ab') }}",
    "attributes of dict": "{{ dict.mro() }}",
    "methods of texts": (
        "{{ ' Ab '.strip().upper().split('B') }}{{ 'a-b'.split('-')[-1] }}{{ 'x'.startswith('x') }}{{ 'abc'[1:] }}"
        "{{ 'abc'[::-1] }}"
    ),
    "methods of dicts": (
        "{% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}{{ v }}{% endfor %}{{ {'a': 1}.get('b', 3) }}"
        "{{ {'b': 1, 'a': 2} | dictsort }}{{ {'a': 1} | items | list }}"
    ),
    "lists are not changed": "{{ messages.append(1) }}",
    "dicts are not changed": "{% set d = {'a': 1} %}{% set _ = d.update({'b': 2}) %}{{ d }}",
    "filters": (
        "{{ messages | map(attribute='role') | join(',') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ [3, 1] | sort }}"
        "{{ 'a b' | title }}{{ 'x' | indent(2, true) }}{{ [1, 2] | last }}{{ none | default('d', true) }}"
    ),
    "escapes of HTML": "{{ '<a>' | e }}{{ '<a>' | escape ~ '<b>' }}{{ '<a>' | safe ~ '<b>' }}{{ '<b>' ~ ('<a>' | e) }}",
    "tests": (
        "{{ 1 is number }}{{ 'a' is string }}{{ {} is mapping }}{{ [] is iterable }}{{ [] is sequence }}"
        "{{ none is none }}{{ 3 is divisibleby 3 }}{{ 2 in [1, 2] }}"
    ),
    "numbers and texts": (
        "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ 'a' * 3 }}{{ 'a' ~ 1 ~ none ~ true }}{{ '%s-%02d' % ('a', 3) }}"
        "{{ '{}:{a}'.format(1, a=2) }}{{ '%s' | format('x') }}"
    ),
    "texts that are joined with numbers": "{{ 'a' + 1 }}",
    "an index beyond the end": "{{ messages[99].content }}",
    "slices": "{{ messages[1:] | length }}{{ messages[:-1] | length }}{{ messages[::-1][0].role }}",
    "set with a block": "{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ x | length }}",
    "filter blocks": "{% filter upper %}abc{% endfilter %}",
    "raw": "{% raw %}{{ a }}{% endraw %}",
    "do is unknown": "{% do 1 %}",
    "translations are unknown": "{% trans %}a{% endtrans %}",
    "includes": "{% include 'x' %}",
    "imports": "{% import 'x' as y %}",
    "extends": "{% extends 'x' %}",
    "blocks": "{% block a %}x{% endblock %}{{ self.a() }}",
    "internals": "{{ ''.__class__ }}",
    "internals of a function": "{{ raise_exception.__globals__ }}",
    "internals by a filter": "{{ '' | attr('__class__') }}",
    "cycler, joiner, lipsum": (
        "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{% set j = joiner(',') %}{{ j() }}{{ j() }}"
        "{{ lipsum is defined }}"
    ),
    "loop variables": (
        "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
        "{{ loop.previtem.role if loop.previtem }}{{ loop.nextitem is defined }}{{ loop.cycle('x', 'y') }}"
        "{% else %}none{% endfor %}"
    ),
    "a changed loop": "{% for m in messages if m.role == 'user' %}{{ loop.changed(m.role) }}{% endfor %}",
    "booleans": "{{ true }}{{ True }}{{ none }}{{ None }}{{ false and nothing }}{{ not none }}{{ 1 if false }}",
    "an unknown filter": "{{ 1 | unheard_of }}",
    "an unknown filter that is not reached": "{% if false %}{{ 1 | unheard_of }}{% endif %}x",
    "an unknown test": "{{ 1 is unheard_of }}",
    "an unknown function": "{{ unheard_of() }}",
    "broken off": "{% if messages",
    "an unknown tag": "{% unheard_of %}",
    "division by zero": "{{ 1 / 0 }}",
    "division by zero that is not reached": "{% if messages | length > 99 %}{{ 1 / 0 }}{% endif %}x",
    "a long range": "{{ range(1000000) | length }}",
}  # fmt: skip
DATA = Path(__file__).parent.parent / "data" / "chat_templates"
PUBLISHED = {path.stem: path for path in sorted(DATA.glob("*.jinja"))}
OF_TRANSFORMERS = (
    "llama4/processing_llama4.py",
    "qwen2_audio/processing_qwen2_audio.py",
    "smolvlm/processing_smolvlm.py",
)


def templates_in(source: str) -> Iterator[str]:
    """The chat templates among the string constants of Python code."""

    class Found(ast.NodeVisitor):
        def __init__(self) -> None:
            self.texts: list[str] = []

        def visit_Constant(self, node: ast.Constant) -> None:
            if isinstance(node.value, str) and "{%" in node.value and "messages" in node.value:
                self.texts.append(node.value)

    found = Found()
    found.visit(ast.parse(source))
    yield from found.texts


@cache
def oracle() -> PreTrainedTokenizerFast:
    """A tokenizer of transformers with the special tokens of `tokenizer_of`."""
    vocabulary = {BOS: 0, EOS: 1}
    return PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE(vocabulary, [])), bos_token=BOS, eos_token=EOS)


def wanted(template: str, messages: list[dict[str, Any]]) -> str | None:
    """The text that transformers renders; None if it refuses."""
    try:
        found = oracle().apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception:
        return None
    assert isinstance(found, str)
    return found


def tokenizer_of(template: str, folder: Path, **more: Any) -> Tokenizer:
    """The tokenizer of a GGUF file in which every byte is a token; BOS and EOS are user-defined, so they are shown."""
    vocabulary = byte_level(control=(), more=[(BOS, USER_DEFINED), (EOS, USER_DEFINED)])
    tokens = vocabulary["tokens"]
    given = {"bos": tokens.index(BOS), "eos": tokens.index(EOS), "add_bos": False, "template": template} | more
    path = write_scripted(folder / "model.gguf", **vocabulary, **given)
    return Tokenizer(open_checkpoint(str(path)))


def chatted(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int] | None:
    """The prompt's tokens; None for an error with a hint."""
    try:
        return tokenizer.chat(messages)
    except HeadraceError as error:
        if not error.hint:
            raise
        return None


def check(template: str, folder: Path) -> None:
    """Compare every conversation with the oracle."""
    different: dict[str, tuple[str | None, str | None]] = {}
    conversations = CONVERSATIONS
    try:
        tokenizer = tokenizer_of(template, folder)
    except CheckpointError as error:  # a broken template, refused at load
        if not error.hint:
            raise
        different = {name: (text, None) for name in CONVERSATIONS if (text := wanted(template, CONVERSATIONS[name]))}
        conversations = {}
    for name, messages in conversations.items():
        right = wanted(template, messages)
        got = chatted(tokenizer, messages)
        expected = None if right is None else tokenizer.encode(right)
        if got != expected:
            different[name] = (right, None if got is None else tokenizer.decode(got))
    assert not different, "\n".join(f"{name}:\n  right {a!r}\n  got   {b!r}" for name, (a, b) in different.items())[
        :4000
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_template_renders_as_in_transformers(name: str, tmp_path: Path) -> None:
    template = PUBLISHED[name].read_text(encoding="utf-8")
    assert any(wanted(template, messages) for messages in CONVERSATIONS.values())
    check(template, tmp_path)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_a_template_in_transformers_package_renders_as_in_transformers(name: str, tmp_path: Path) -> None:
    code = Path(transformers.__file__).parent / "models" / name
    if not code.exists():
        pytest.skip(f"this version of transformers has no {name}")
    templates = list(templates_in(code.read_text(encoding="utf-8")))
    assert templates
    for template in templates:
        check(template, tmp_path)


@pytest.mark.parametrize("name", FEATURES)
def test_a_template_feature_renders_as_in_transformers(name: str, tmp_path: Path) -> None:
    check(FEATURES[name], tmp_path)


def test_a_conversation_without_messages_is_refused_as_in_transformers(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        tokenizer_of("x{{ messages | length }}", tmp_path).chat([])
    assert refused.value.hint


def test_special_tokens_that_the_file_does_not_name_are_undefined(tmp_path: Path) -> None:
    """transformers passes a template only tokens that exist."""
    template = "{{ bos_token is defined }} {{ eos_token is defined }}"
    vocabulary = byte_level(control=())
    path = write_scripted(tmp_path / "model.gguf", **vocabulary, template=template)
    tokenizer = Tokenizer(open_checkpoint(str(path)))
    assert tokenizer.decode(tokenizer.chat([user("hi")])) == "False False"


def test_the_unknown_and_the_padding_token_are_template_variables(tmp_path: Path) -> None:
    template = "[{{ unk_token }}][{{ pad_token }}]"
    vocabulary = byte_level(control=(), more=[("<u>", USER_DEFINED), ("<p>", USER_DEFINED)])
    tokens = vocabulary["tokens"]
    ids = {"unknown_token_id": tokens.index("<u>"), "padding_token_id": tokens.index("<p>")}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in ids.items()}
    path = write_scripted(tmp_path / "model.gguf", **vocabulary, template=template, metadata=metadata)
    tokenizer = Tokenizer(open_checkpoint(str(path)))
    assert tokenizer.chat([user("hi")]) == tokenizer.encode("[<u>][<p>]")


# Folders


def backend_of_bytes() -> Backend:
    """A tokenizer in which every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Backend(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = decoders.ByteLevel()
    return found


CONFIG = {"model_type": "llama", "vocab_size": 260, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}


def folder_with(backend: Backend, folder: Path, **settings: Any) -> Path:
    """A folder with this tokenizer; its weights are one matrix."""
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"model.embed_tokens.weight": np.zeros((260, 64), np.float32)}, folder / "model.safetensors")
    return folder


NAMED = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ tools }}", "rag": "R"}


@pytest.mark.parametrize("storage", ["a list in tokenizer_config.json", "files"])
def test_the_default_of_several_templates_is_used_without_tools(storage: str, tmp_path: Path) -> None:
    if storage == "files":
        path = folder_with(backend_of_bytes(), tmp_path / "model")
        (path / "chat_template.jinja").write_text(NAMED["default"])
        (path / "additional_chat_templates").mkdir()
        (path / "additional_chat_templates" / "tool_use.jinja").write_text(NAMED["tool_use"])
    else:
        named = [{"name": name, "template": template} for name, template in NAMED.items()]
        path = folder_with(backend_of_bytes(), tmp_path / "model", chat_template=named)
    tokenizer = Tokenizer(open_checkpoint(str(path)))
    assert tokenizer.decode(tokenizer.chat([user("hi")])) == "Dhi"


def test_further_templates_of_a_gguf_file_leave_the_default_unchanged(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.chat_templates": ["tool_use", "rag"],
        "tokenizer.chat_template.tool_use": NAMED["tool_use"],
        "tokenizer.chat_template.rag": NAMED["rag"],
    }
    tokenizer = tokenizer_of(NAMED["default"], tmp_path, metadata=metadata)
    assert tokenizer.decode(tokenizer.chat([user("hi")])) == "Dhi"


def test_a_folders_template_gets_all_special_tokens_in_its_config(tmp_path: Path) -> None:
    backend = backend_of_bytes()
    backend.add_tokens(["<s>", "</s>", "<u>", "<p>"])
    template = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ sep_token is defined }}"
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<u>", "pad_token": "<p>"}
    path = folder_with(backend, tmp_path / "model", chat_template=template, **names)
    tokenizer = Tokenizer(open_checkpoint(str(path)))
    right = transformers.AutoTokenizer.from_pretrained(str(path)).apply_chat_template([user("a")], tokenize=False)
    assert right == "<s>|</s>|<u>|<p>|False"
    assert tokenizer.chat([user("a")]) == tokenizer.encode(right)


def test_a_folders_conversation_has_the_tokens_of_transformers(tmp_path: Path) -> None:
    """No BOS token is added before the rendered template."""
    backend = backend_of_bytes()
    backend.add_special_tokens(["<s>"])
    number = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", number)]
    )
    path = folder_with(backend, tmp_path / "model", chat_template="[{{ messages[0].content }}]", bos_token="<s>")
    right = transformers.AutoTokenizer.from_pretrained(str(path)).apply_chat_template([user("a")], return_dict=False)
    assert Tokenizer(open_checkpoint(str(path))).chat([user("a")]) == right


# Hostile templates: an error with a hint

BROKEN = {
    "division by zero": "{{ 1 / 0 }}",
    "a remainder of zero": "{{ 1 % 0 }}",
    "a floor division by zero": "{{ 1 // 0 }}",
    "zero to a negative power": "{{ 0 ** -1 }}",
    "an overflow": "{{ 2.0 ** 100000 }}",
    "a range that is too long": "{{ range(10 ** 9) }}",
    "infinity as a whole number": "{{ (1e308 * 10) | int }}{{ (1e308 * 10) | round | int }}{{ 'x' * (1e308 * 10) }}",
    "an unknown filter": "{{ 1 | unheard_of }}",
    "an unknown filter, by name": "{{ [1] | map('unheard_of') | list }}",
    "an unknown test, by name": "{{ [1] | select('unheard_of') | list }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two macros that call each other": (
        "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}"
    ),
    "a block that contains itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "a loop that calls itself": "{% set x = [1] %}{% for i in x recursive %}{{ loop(x) }}{% endfor %}",
    "half a pair of surrogates": "{{ '\\ud800' }}",
    "the other half": "a{{ '\\udfff' }}b",
    "half a pair of surrogates from a slice": "{{ '\\ud83d\\ude00'[0] }}",
    "half a pair of surrogates from a filter": "{{ '%c' | format(55296) }}",
    "surrogates in an error message": "{{ raise_exception('\\ud800') }}",
    "escape sequences in an error message": "{{ raise_exception(messages) }}",
    "a message that is missing": "{{ raise_exception() }}",
    "a codec that is unknown": "{{ 'a'.encode('unheard_of') }}",
    "a text that cannot be encoded": "{{ '\\ud800'.encode() }}",
    "bytes that cannot be decoded": "{{ 'é'.encode('latin-1').decode() }}",
    "a cycler of nothing": "{{ cycler() }}",
    "many parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "many lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "many conditions": "{% if true %}" * 2000 + "{% endif %}" * 2000,
    "many loops": "{% for a in [1] %}" * 60 + "x" + "{% endfor %}" * 60,
    "many minus signs": "{{ " + "-" * 20000 + "1 }}",
    "many negations": "{{ " + "not " * 20000 + "1 }}",
    "many sums": "{{ " + "1 + " * 20000 + "1 }}",
    "many joined texts": "{{ " + "1 ~ " * 50000 + "1 }}",
    "many filters": "{{ 1" + " | string" * 20000 + " }}",
    "many attributes": "{{ messages" + "[0]" * 20000 + " }}",
    "many macros in one another": "{% macro a() %}" * 300 + "{% endmacro %}" * 300,
    "many arguments": "{% macro f(" + ", ".join(f"a{i}" for i in range(5000)) + ") %}{% endmacro %}{{ f(" + "x" * 10 + "(}}",
    "a list in itself": (
        "{% set n = namespace(x=[1]) %}{% for i in range(3000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}"
    ),
    "a deep list as JSON": (
        "{% set n = namespace(x=[1]) %}{% for i in range(3000) %}{% set n.x = [n.x] %}{% endfor %}"
        "{{ n.x | tojson }}"
    ),
    "a deep list, compared": (
        "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(3000) %}{% set n.x = [n.x] %}{% set n.y = [n.y] %}"
        "{% endfor %}{{ n.x == n.y }}"
    ),
    "a large number as text": "{{ 10 ** 5000 }}",
    "a text as a large number": "{{ ('9' * 5000) | int | string | length }}{{ 1 // 0 }}",
    "a date that is unknown": "{{ strftime_now('\\ud800') }}",
    "a date with a zero byte": "{{ strftime_now('%Y\\0%Y') | length }}{{ 1 // 0 }}",
    "a name that is a keyword of Python": "{% set None = 1 %}",
    "names that Python would compose": "{{ ﬁ }}{{ 1 // 0 }}",
    "an import": "{% from 'x' import y %}",
    "sorting what cannot be compared": "{{ [1, 'a'] | sort }}",
    "a key that cannot be one": "{{ {[]: 1} }}",
    "a missing attribute": "{{ messages.x.y.z }}",
    "calling a text": "{{ 'a'() }}",
    "a star that is no list": "{{ dict(*1) }}",
    "two stars that are no dict": "{{ dict(**1) }}",
    "doubled arguments": "{{ dict(a=1, **{'a': 2}) }}",
    "unpacking too few": "{% for a, b, c in messages %}{% endfor %}",
    "a generator that fails": "{{ messages | map(attribute='a.b.c') | map('length') | list }}",
    "batches of nothing": "{{ [1] | slice(0) | list }}",
    "internals": "{{ ''.__class__.__mro__ }}",
    "internals by a format": "{{ '{0.__class__.__mro__}'.format('') }}{{ 1 // 0 }}",
    "internals by a map of a format": "{{ '{a.__class__}'.format_map({'a': 1}) }}{{ 1 // 0 }}",
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_template_is_refused_with_a_hint(name: str, tmp_path: Path) -> None:
    """Refused if transformers refuses it or renders invalid Unicode. Some of these templates are only unusual."""
    template = BROKEN[name]
    right = wanted(template, [user("hi")])
    is_text = right is not None and right == right.encode(errors="replace").decode()
    judge = verdict if is_text else refusal
    assert judge(lambda: tokenizer_of(template, tmp_path).chat([user("hi")])) == FINE


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ude00\ud83d"])
def test_an_unpaired_surrogate_in_a_prompt_is_refused_with_a_hint(text: str, tmp_path: Path) -> None:
    """JSON and batch files can contain them; no tokenizer accepts them."""
    tokenizer = tokenizer_of("{{ messages[0].content }}", tmp_path)
    assert refusal(lambda: tokenizer.chat([user(text)])) == FINE
    assert refusal(lambda: tokenizer.prompt(text, raw=True)) == FINE
    assert refusal(lambda: tokenizer.encode(text)) == FINE


def test_a_template_may_contain_a_zero_byte_and_any_character(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("\0{{ '\\0' }}\U0010ffff\u202e{{ messages[0].content }}", tmp_path)
    assert tokenizer.chat([user("a")]) == tokenizer.encode("\0\0\U0010ffff\u202ea")


# Hostile templates: limits on time and memory, in a separate process


def doubled(start: str, step: str, end: str) -> str:
    return (
        "{% set n = namespace(x=" + start + ") %}{% for i in range(40) %}{% set n.x = " + step + " %}{% endfor %}" + end
    )


FLOODS = {
    "a text that is multiplied": "{{ 'x' * 3000000000 }}",
    "a text that is multiplied, of which the length is shown": "{{ ('x' * 3000000000) | length }}",
    "a list that is multiplied": "{{ ([1] * 900000000) | length }}",
    "a tuple that is multiplied": "{{ ((1, 2) * 900000000) | length }}",
    "a format with a width": "{{ ('%3000000000s' % 'a') | length }}",
    "a format with a width that is given": "{{ ('%*s' % (3000000000, 'a')) | length }}",
    "a format with a precision": "{{ '%.2000000000f' % 1.5 }}",
    "a new format with a width": "{{ '{:3000000000}'.format('a') | length }}",
    "a new format with a width that is given": "{{ '{:{w}}'.format('a', w=3000000000) | length }}",
    "the filter format": "{{ '%3000000000s' | format('a') | length }}",
    "center": "{{ 'a' | center(3000000000) | length }}",
    "ljust": "{{ 'a'.ljust(3000000000) | length }}",
    "zfill": "{{ 'a'.zfill(3000000000) | length }}",
    "expandtabs": "{{ '\\t'.expandtabs(2000000000) | length }}",
    "indent": "{{ ('a\\n' * 60000) | indent(90000) | length }}",
    "replace": "{% set a = 'x' * 90000 %}{{ a.replace('x', a) | length }}",
    "join": "{% set a = 'x' * 90000 %}{{ a.join(a | list) | length }}",
    "texts joined again and again": doubled("'x'", "n.x ~ n.x", "{{ n.x | length }}"),
    "texts added again and again": doubled("'x'", "n.x + n.x", "{{ n.x | length }}"),
    "lists added again and again": doubled("[1]", "n.x + n.x", "{{ n.x | length }}"),
    "lists in lists, as text": doubled("[1]", "[n.x, n.x]", "{{ n.x | string | length }}"),
    "lists in lists, as JSON": doubled("[1]", "[n.x, n.x]", "{{ n.x | tojson | length }}"),
    "dicts in dicts": doubled("{}", "{'a': n.x, 'b': n.x}", "{{ n.x }}"),
    "JSON with a wide indent": "{{ [1] | tojson(indent=3000000000) | length }}",
    "batches that are filled up": "{{ [1] | batch(900000000, 0) | list | length }}",
    "a list of ranges": (
        "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = n.x + range(99999) | list %}"
        "{% endfor %}"
    ),
    "a long text": "{% for a in range(99999) %}{% for b in range(99999) %}" + "x" * 200 + "{% endfor %}{% endfor %}",
    "a block that is captured": (
        "{% set x %}{% for a in range(99999) %}{% for b in range(99999) %}yyyyyyyyyyyyyyyy{% endfor %}{% endfor %}"
        "{% endset %}"
    ),
    "padding of a date": "{{ strftime_now('%c' * 90000000) | length }}",
}  # fmt: skip
HANGS = {
    "lipsum": "{{ lipsum(n=100000000) | length }}",
    "a macro that doubles": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% else %}xxxxxxxxxxxxxxxx{% endif %}{% endmacro %}"
        "{{ f(40) }}"
    ),
    "nested loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}"
    ),
    "a loop over a product": "{% for a in range(99999) %}{% if range(99999) | sum < 0 %}x{% endif %}{% endfor %}",
    "a power": "{{ 7 ** (9 ** 9) > 1 }}",
    "a tower of powers": "{{ 10 ** (10 ** 10) > 1 }}",
    "a large number as text": "{{ '%d' % (3 ** 20000000) }}",
    "lists in lists, compared": (
        "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
        "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}"
    ),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}{% endmacro %}"
        "{{ f(60) }}"
    ),
    "a search in a long text": (
        "{% set a = 'a' * 300000 %}{% for i in range(99999) %}{% if (a ~ 'b') in (a ~ a ~ 'c') %}x{% endif %}"
        "{% endfor %}"
    ),
}  # fmt: skip


def chat_within_bounds(name: str) -> str:
    """Runs in a worker of bounded memory."""
    with tempfile.TemporaryDirectory() as folder:
        return refusal(lambda: tokenizer_of(FLOODS[name], Path(folder)).chat([user("hi")]))


def chat_in_threads(names: tuple[str, ...]) -> str:
    """Several templates at once, each in a thread: an endless one uses up only its own time limit."""

    def one(name: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            return refusal(lambda: tokenizer_of(HANGS[name], Path(folder)).chat([user("hi")]))

    with ThreadPoolExecutor(len(names)) as pool:
        wrong = {name: outcome for name, outcome in zip(names, pool.map(one, names), strict=True) if outcome != FINE}
    return str(wrong) if wrong else FINE


@pytest.mark.zoo
def test_a_template_that_floods_memory_is_refused() -> None:
    assert not faults(chat_within_bounds, list(FLOODS), seconds=30, memory=GIB)


@pytest.mark.zoo
def test_a_template_that_never_ends_is_refused_in_any_thread() -> None:
    names = tuple(HANGS)
    assert not faults(chat_in_threads, [names], workers=1, seconds=60, memory=4 * GIB)


def test_a_template_is_usable_again_after_one_conversation_took_too_long(tmp_path: Path) -> None:
    """An ended process leaves nothing behind."""
    template = "{% if messages[0].content == 'flood' %}{{ 'x' * 10 ** 15 }}{% endif %}[{{ messages[0].content }}]"
    tokenizer = tokenizer_of(template, tmp_path)
    outcome = refusal(lambda: tokenizer.chat([user("flood")]))
    assert outcome == FINE
    assert tokenizer.chat([user("hi")]) == tokenizer.encode("[hi]")


# tokenizer.json


def growing(kind: str) -> Backend:
    """A tokenizer that expands one character or one token to 2^36 characters."""
    backend = backend_of_bytes()
    if kind == "normalizers":
        backend.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa")] * 36)
    elif kind == "a normalizer by a pattern":
        backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex("."), "aaaa")] * 18)
    elif kind == "a normalizer of nothing":
        backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(""), "a")] * 36)
    elif kind == "one normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Replace("a", "a" * 70000)] * 3)
    elif kind == "normalizers in one another":
        inner = normalizers.Sequence([normalizers.Replace("a", "aa")] * 6)
        backend.normalizer = normalizers.Sequence([normalizers.Sequence([inner] * 3)] * 2)
    elif kind == "decoders":
        backend.decoder = decoders.Sequence([decoders.Replace("a", "aa")] * 36)
    else:
        assert kind == "a template of the text"
        backend.post_processor = processors.TemplateProcessing(single=" ".join(["$A"] * 200_000), special_tokens=[])
    return backend


GROWING = (
    "normalizers",
    "a normalizer by a pattern",
    "a normalizer of nothing",
    "one normalizer",
    "normalizers in one another",
    "decoders",
    "a template of the text",
)


def tokenize_within_bounds(kind: str) -> str:
    """Runs in a worker of bounded memory; the library aborts it when an allocation fails."""
    with tempfile.TemporaryDirectory() as folder:

        def use() -> object:
            tokenizer = Tokenizer(open_checkpoint(str(folder_with(growing(kind), Path(folder) / "model"))))
            tokenizer.decode(tokenizer.encode("a" * 20_000))
            stream = tokenizer.stream()
            return [stream.step(token) for token in tokenizer.encode("aaa")][:3]

        return refusal(use)


@pytest.mark.zoo
def test_a_tokenizer_that_expands_text_without_limit_is_refused() -> None:
    assert not faults(tokenize_within_bounds, GROWING, seconds=30, memory=GIB)


def test_a_tokenizer_that_expands_single_characters_is_accepted(tmp_path: Path) -> None:
    """Published tokenizers prepend a character, compose characters, and replace some by several."""
    backend = backend_of_bytes()
    spelled = [
        normalizers.Prepend("_"),
        normalizers.NFKC(),
        normalizers.Replace(" ", "_"),
        normalizers.Replace("…", "..."),
    ]
    backend.normalizer = normalizers.Sequence(spelled)
    tokenizer = Tokenizer(open_checkpoint(str(folder_with(backend, tmp_path / "model"))))
    assert tokenizer.decode(tokenizer.encode("a b…")) == "_a_b..."
