"""3,000 mutated inputs with fixed seeds give a result or an error with a hint, in bounded time and memory.

A failure names its case. To try it again, in this folder:
python -c "import test_mutated_inputs as t; print(t.attempt(('gguf', 17)))"
"""

import json
import math
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from headrace.checkpoint import open_checkpoint
from headrace.cli import main
from headrace.model.tokenizer import Tokenizer
from headrace.plan import guessed_profile
from headrace.plan.record import PassGroup, RunRecord
from headrace.plan.routing import Routing, routing_path, save_routing
from headrace.units import GIB, MIB
from support.bounded import FINE, described, faults, verdict
from support.zoo.folders import tiny_model, write_folder
from support.zoo.gguf_files import random_model, write_gguf
from support.zoo.scripted import CHATML, byte_level, write_scripted

pytestmark = pytest.mark.zoo

COUNTS = {"gguf": 1100, "folder": 700, "template": 800, "profile": 400}
assert sum(COUNTS.values()) == 3000
SECONDS = 20.0  # time limit of one input, on a busy machine
MEMORY = 600 * MIB
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    1 << 16,
    1 << 31,
    (1 << 32) - 1,
    1 << 33,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
IN_JSON: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    1 << 31,
    1 << 63,
    1 << 70,
    10**400,
    0.5,
    -0.0,
    1e308,
    5e-324,
    math.nan,
    math.inf,
    "",
    "x",
    "\ud800",
    "\0",
    "../x",
    "x" * 70_000,
    [],
    [0],
    [-1, 1 << 40],
    [[]],
    [None],
    {},
    {"a": 1},
    {"": {}},
    {"type": "x"},
    "NFC",
    "1e5",
)


# GGUF


def read_header(content: bytes) -> tuple[list[list[Any]], list[list[Any]], int]:
    """[key, type, value bytes] of each pair, [name, dimensions, type, offset] of each tensor, and the header's end."""
    at = 8
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def take(layout: str) -> Any:
        nonlocal at
        found = struct.unpack_from("<" + layout, content, at)
        at += struct.calcsize("<" + layout)
        return found[0]

    def text() -> bytes:
        nonlocal at
        length = take("Q")
        at += length
        return content[at - length : at]

    tensors, pairs = take("Q"), take("Q")
    found: list[list[Any]] = []
    for _ in range(pairs):
        key, kind = text(), take("I")
        start = at
        if kind == 8:
            text()
        elif kind == 9:
            inner, count = take("I"), take("Q")
            if inner == 8:
                for _ in range(count):
                    text()
            else:
                at += count * widths[inner]
        else:
            at += widths[kind]
        found.append([key, kind, content[start:at]])
    table = []
    for _ in range(tensors):
        name = text()
        dimensions = [take("Q") for _ in range(take("I"))]
        table.append([name, dimensions, take("I"), take("Q")])
    return found, table, at


def write_header(pairs: list[list[Any]], table: list[list[Any]], rest: bytes, alignment: int = 32) -> bytes:
    """The file with this header, sound or not."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(table), len(pairs))]
    for key, kind, value in pairs:
        out += [struct.pack("<Q", len(key)), key, struct.pack("<I", kind), value]
    for name, dimensions, kind, offset in table:
        out += [struct.pack("<Q", len(name)), name, struct.pack("<I", len(dimensions))]
        out += [
            struct.pack(f"<{len(dimensions)}Q", *(n % (1 << 64) for n in dimensions)),
            struct.pack("<IQ", kind, offset),
        ]
    head = b"".join(out)
    return head + bytes(-len(head) % alignment) + rest


def any_value(chance: random.Random) -> tuple[int, bytes]:
    """A type and a value of GGUF."""
    kind = chance.choice([0, 4, 5, 6, 7, 8, 9, 10, 11, 12, 77])
    number = chance.choice(NUMBERS)
    if kind == 8:
        data = chance.choice([b"", b"word", b"\xff\xfe", b"{{ 1 / 0 }}", b"x" * 3000])
        return kind, struct.pack("<Q", len(data)) + data
    if kind == 9:
        inner = chance.choice([4, 5, 6, 8, 11])
        values = {
            4: struct.pack("<3I", 1, 2, 0),
            5: struct.pack("<3i", -1, 1 << 30, 0),
            6: struct.pack("<3f", math.nan, 1, 1e38),
            8: 3 * struct.pack("<Q1s", 1, b"a"),
            11: struct.pack("<3q", -1, 1 << 40, 0),
        }
        return kind, struct.pack("<IQ", inner, chance.choice([3, 3, 3, 0, 2, 4, 1 << 30])) + values[inner]
    if kind in (6, 12):
        return kind, struct.pack("<f" if kind == 6 else "<d", chance.choice([0.0, -1.0, 0.5, 1e38, math.nan, math.inf]))
    width = {0: 1, 7: 1, 4: 4, 5: 4, 10: 8, 11: 8, 77: 4}[kind]
    return kind, (number % (1 << 8 * width)).to_bytes(width, "little")


def edit(data: bytearray, chance: random.Random, end: int) -> None:
    """One change of bytes before `end`."""
    at = chance.randrange(min(end, len(data)))
    what = chance.randrange(7)
    if what == 0:
        data[at] ^= 1 << chance.randrange(8)
    elif what == 1:
        data[at] = chance.choice([0, 1, 2, 127, 128, 255])
    elif what == 2:
        data[at : at + 8] = (chance.choice(NUMBERS) % (1 << 64)).to_bytes(8, "little")
    elif what == 3:
        del data[at : at + chance.choice([1, 4, 8, 64])]
    elif what == 4:
        data[at:at] = chance.randbytes(chance.choice([1, 4, 8, 64]))
    elif what == 5:
        data[at:at] = data[at : at + chance.choice([8, 32, 200])]
    else:
        del data[max(at, 1) :]


@cache
def gguf_bases() -> tuple[bytes, ...]:
    """A scripted model, which has a tokenizer and a template, and models with rarer features."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        found = [write_scripted(path, **byte_level(), eos=258, kind=np_half()).read_bytes()]
        for name in ("qwen3moe", "gemma3", "lfm2moe", "granitehybrid"):
            found.append(write_gguf(random_model(name), name, path).read_bytes())
    return tuple(found)


def np_half() -> Any:
    import numpy as np

    return np.float16


def mutated_gguf(chance: random.Random) -> tuple[bytes, int]:
    """A mutated file, and its declared size."""
    content = chance.choice(gguf_bases())
    pairs, table, end = read_header(content)
    if chance.random() < 0.4:
        data = bytearray(content)
        for _ in range(chance.choice([1, 1, 2, 5])):
            edit(data, chance, end)
            if not data:
                data = bytearray(b"G")
    else:
        rest = content[-(-end // 32) * 32 :]
        for _ in range(chance.choice([1, 1, 1, 2, 4])):
            change_header(pairs, table, chance)
        data = bytearray(write_header(pairs, table, rest))
    return bytes(data), chance.choice([0, 0, 0, len(data) // 2, 9 * GIB])


def change_header(pairs: list[list[Any]], table: list[list[Any]], chance: random.Random) -> None:
    """One change that leaves the file readable."""
    what = chance.randrange(13)
    pair, tensor = chance.choice(pairs), chance.choice(table)
    if what < 3:
        pair[1:] = any_value(chance)
    elif what == 3 and pair[1] == 8:  # a mutated length
        pair[2] = (chance.choice(NUMBERS) % (1 << 64)).to_bytes(8, "little") + pair[2][8:]
    elif what == 3 and pair[1] == 9:  # a mutated count
        pair[2] = pair[2][:4] + (chance.choice(NUMBERS) % (1 << 64)).to_bytes(8, "little") + pair[2][12:]
    elif what == 4 and pair[1] in (4, 5):
        pair[2] = (chance.choice(NUMBERS) % (1 << 32)).to_bytes(4, "little")
    elif what == 5:
        pairs.remove(pair)
        if not pairs:
            pairs.append(pair)
    elif what == 6:
        kind, value = any_value(chance)
        names = (
            b"split.count",
            b"general.alignment",
            b"tokenizer.ggml.bos_token_id",
            b"general.sampling.temp",
            b"llama.expert_count",
            b"llama.rope.scaling.type",
            b"tokenizer.chat_template",
            b"\xff",
            b"",
            b"general.type",
        )
        pairs.append([chance.choice(names), kind, value])
    elif what == 7:
        if tensor[1]:
            tensor[1][chance.randrange(len(tensor[1]))] = chance.choice(NUMBERS)
    elif what == 8:
        tensor[chance.choice([2, 3])] = chance.choice([0, 1, 2, 3, 8, 12, 30, 39, 99, 1 << 31])
    elif what == 9:
        table.remove(tensor)
        if not table:
            table.append(tensor)
    else:
        numbers = [one for one in pairs if one[1] in (4, 5, 10, 11)] or [pair]
        number = (chance.choice(NUMBERS) + (1 << 63)) % (1 << 64) - (1 << 63)
        chance.choice(numbers)[1:] = 11, number.to_bytes(8, "little", signed=True)


def try_gguf(chance: random.Random, folder: Path) -> str:
    """Plan a mutated GGUF file, and render a prompt with its tokenizer."""
    content, size = mutated_gguf(chance)
    path = folder / "model.gguf"
    path.write_bytes(content)
    if size:
        os.truncate(path, size)
    return used(path)


def used(path: Path) -> str:
    """The fault of a prompt with a model's tokenizer, else of a plan from its headers."""
    outcome = verdict(lambda: Tokenizer(open_checkpoint(str(path))).chat([{"role": "user", "content": "hi"}]))
    return outcome if outcome != FINE else invoked("plan", str(path), "--memory", "2GiB")


def invoked(*arguments: str) -> str:
    """The fault of a command: a traceback or a signal."""
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return described(result.exception)
    return f"killed by {-result.exit_code}" if result.exit_code < 0 else FINE


# Folders


@cache
def folder_base() -> dict[str, bytes]:
    """The files of a tiny model with a tokenizer and a template, in two shards."""
    with tempfile.TemporaryDirectory() as outer:
        folder = write_folder(tiny_model("llama"), Path(outer) / "model", shards=2)
        backend = Backend(
            models.BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("a", "b")])
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        backend.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values within a JSON value."""
    found = [place] if place else []
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, one in inner:
        found += places(one, (*place, key))
    return found


def change_json(value: Any, chance: random.Random) -> Any:
    """Change, remove, double or move one value within a JSON value."""
    all_places = places(value)
    if not all_places:
        return chance.choice(IN_JSON)
    shallow = [
        place for place in all_places if len(place) < 3
    ] or all_places  # a vocabulary is most of a tokenizer.json
    place = chance.choice(shallow if chance.random() < 0.8 else all_places)
    outer = value
    for key in place[:-1]:
        outer = outer[key]
    what = chance.randrange(5)
    if what == 0:
        del outer[place[-1]]
    elif what == 1 and isinstance(outer, dict):
        outer[chance.choice(["", "x", "type", "text_config", "quantization_config", "auto_map"])] = outer.pop(place[-1])
    elif what == 2:
        outer[place[-1]] = [outer[place[-1]]] * chance.choice([1, 2, 40])
    else:
        outer[place[-1]] = chance.choice(IN_JSON)
    return value


def change_file(name: str, content: bytes, chance: random.Random) -> bytes:
    """Change the content of a folder's file."""
    if name.endswith(".json") and chance.random() < 0.8:
        value = json.loads(content)
        for _ in range(chance.choice([1, 1, 1, 3])):
            value = change_json(value, chance)
        return json.dumps(value).encode()
    if name.endswith(".safetensors") and chance.random() < 0.6:
        length = int.from_bytes(content[:8], "little")
        header = json.dumps(change_json(json.loads(content[8 : 8 + length]), chance)).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 4])):
        edit(data, chance, min(len(data), 4000))
        if not data:
            return b""
    return bytes(data)


def try_folder(chance: random.Random, folder: Path) -> str:
    """Use a folder with one file changed, or of another kind."""
    files = dict(folder_base())
    weights = {"config.json": 4, "tokenizer.json": 4, "tokenizer_config.json": 3, "generation_config.json": 2}
    name = chance.choices(list(files), [weights.get(one, 2) for one in files])[0]
    path = folder / "model"
    path.mkdir()
    what = chance.randrange(12)
    if what:
        files[name] = change_file(name, files[name], chance)
    for one, content in files.items():
        (path / one).write_bytes(content)
    if not what:
        change_kind(path / name, chance)
    return used(path)


def change_kind(path: Path, chance: random.Random) -> None:
    """Make a file absent, empty, a folder, a link to itself or to nowhere, or gigabytes long."""
    what = chance.randrange(6)
    if what == 5:
        os.truncate(path, 9 * GIB)
        return
    path.unlink()
    if what == 1:
        path.touch()
    elif what == 2:
        path.mkdir()
    elif what == 3:
        path.symlink_to(path.name)
    elif what == 4:
        path.symlink_to("nowhere")


# Templates

WHOLE = sorted((Path(__file__).parent / "data" / "chat_templates").glob("*.jinja"))
FRAGMENTS = (
    "{% for m in messages %}",
    "{% for i in range(9) %}",
    "{% for i in range(90000) %}",
    "{% endfor %}",
    "{% if m %}",
    "{% else %}",
    "{% elif 1 %}",
    "{% endif %}",
    "{% set x = x ~ x %}",
    "{% set x = 'ab' * 9000 %}",
    "{% set n.x = [n.x, n.x] %}",
    "{% break %}",
    "{% set n = namespace(x='a') %}",
    "{% set n.x = n.x + n.x %}",
    "{% macro f(a) %}",
    "{% endmacro %}",
    "{{ f(f(1)) }}",
    "{{ f(a) }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% block b %}",
    "{% endblock %}",
    "{{ self.b() }}",
    "{% call f(2) %}",
    "{% endcall %}",
    "{% filter indent(9) %}",
    "{% endfilter %}",
    "{% raw %}",
    "{% endraw %}",
    "{% set y %}",
    "{% endset %}",
    "{% continue %}",
    "{# ",
    " #}",
    "{{ ",
    " }}",
    "{% ",
    " %}",
    "{{- ",
    " -%}",
    "\n",
    "\\",
    "'",
    '"',
    "\ud7ff",
    "\0",
    "{{ 1 / 0 }}",
    "{{ '\\ud800' }}",
    "{{ messages | tojson(indent=2) }}",
    "{{ messages[-1].content }}",
    "{{ messages[9] }}",
    "{{ tools[0] }}",
    "{{ m.role }}",
    "{{ x }}",
    "{{ n.x }}",
    "{{ loop.index }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}",
    "{{ '%9999s' % x }}",
    "{{ '%99999999999s' % 1 }}",
    "{{ 'a' * 99999999999 }}",
    "{{ 9 ** 99999 }}",
    "{{ [0] * 9999999999 }}",
    "{{ x.join(x) }}",
    "{{ x | replace('a', x) }}",
    "{{ x.__class__ }}",
    "{{ x | map('upper') | list }}",
    "{{ messages | groupby('role') }}",
    "{{ x | unheard_of }}",
    "{{ x is unheard_of }}",
    "{{ undefined.a.b }}",
    "{{ cycler() }}",
    "{{ lipsum(n=9) }}",
    "{{ x[::-1] }}",
    "{{ x | int(base=99) }}",
    "{{ x.encode('x') }}",
    "{{ range(9 ** 9) }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "a",
    "<|im_end|>",
)
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [
        {"role": "user", "content": None},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "\ud800", "content": "\udfff"}],
)


def mutated_template(chance: random.Random) -> str:
    """A changed published template, or random fragments."""
    if chance.random() < 0.5:
        return "".join(chance.choices(FRAGMENTS, k=chance.choice([2, 5, 10, 20])))
    text = chance.choice(WHOLE).read_text(encoding="utf-8")
    for _ in range(chance.choice([1, 2, 5])):
        at = chance.randrange(len(text) + 1)
        until = at + chance.choice([0, 1, 5, 50])
        text = text[:at] + chance.choice(["", "", chance.choice(FRAGMENTS), text[until : until + 90]]) + text[until:]
    return text


def try_template(chance: random.Random, folder: Path) -> str:
    """Render a conversation with a mutated template."""
    path = write_scripted(folder / "model.gguf", **byte_level(), eos=258, template=mutated_template(chance))

    def chat() -> None:
        tokenizer = Tokenizer(open_checkpoint(str(path)))
        tokenizer.chat(chance.choice(CONVERSATIONS))

    return verdict(chat)


# Files that headrace keeps


@cache
def kept() -> dict[str, bytes]:
    """A model with experts, and the files of its home."""
    profile = replace(
        guessed_profile(),
        source="measured 2026-01-01",
        disk_bytes_per_s={"1": 1e9},
        spread=(0.8, 1.2),
        repacked_weights_per_s={"Q4_K": {"1": 2e10}},
        factors={"disk": 1.1, "kernel": 1.0, "layer": 1.0, "io_cpu": 0.3},
    )
    group = PassGroup(
        rows=1, count=5, seconds=0.2, read_bytes=1e9, stall_s=0.01, draft_s=0.0, disk_s=0.1, kernel_s=0.05, layer_s=0.01
    )
    record = RunRecord(
        machine=profile.machine,
        model="m",
        weights_bytes=1,
        pinned_bytes=1,
        streamed_bytes=1,
        budget_bytes=1,
        layers=1,
        sequences=1,
        draft="none",
        tokens=1,
        ttft_s=1.0,
        predicted_ttft_s=1.0,
        s_per_token=0.1,
        predicted_s_per_token=0.1,
        drafted=0,
        accepted=0,
        passes=tuple(replace(group, rows=rows) for rows in (1, 2, 3, 4)),
        factors=profile.factors,
    )
    import numpy as np

    with tempfile.TemporaryDirectory() as outer, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_HOME", outer)
        path = write_gguf(random_model("qwen3moe"), "qwen3moe", Path(outer) / "model.gguf")
        checkpoint = open_checkpoint(str(path))
        shape = checkpoint.number("block_count"), checkpoint.number("expert_count")
        save_routing(checkpoint, Routing(scores=np.full(shape, 0.25, np.float32), cached=2, hit_rate=0.5))
        return {
            "model.gguf": path.read_bytes(),
            "profile.json": json.dumps(asdict(profile)).encode(),
            "runs.jsonl": json.dumps(asdict(record)).encode() + b"\n",
            "routing": routing_path(checkpoint).read_bytes(),
        }


def try_profile(chance: random.Random, folder: Path) -> str:
    """Plan beside a damaged profile or routing, fit to damaged records."""
    files = dict(kept())
    name = chance.choice(["profile.json", "profile.json", "runs.jsonl", "routing"])
    if name != "routing" and chance.random() < 0.7:  # the rest is nearly sound, so that it is used
        value = json.loads(files[name])
        place = chance.choice(places(value))
        outer = value
        for key in place[:-1]:
            outer = outer[key]
        outer[place[-1]] = chance.choice(IN_JSON)
        files[name] = json.dumps(value).encode()
    else:
        files[name] = change_file(name.replace("jsonl", "json"), files[name], chance)
    path = folder / "model.gguf"
    path.write_bytes(files["model.gguf"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_HOME", str(folder / "home"))
        place = routing_path(open_checkpoint(str(path)))
        place.parent.mkdir(parents=True)
        place.write_bytes(files["routing"])
        for one in ("profile.json", "runs.jsonl"):
            (folder / "home" / one).write_bytes(files[one])
        return invoked("fit") if name == "runs.jsonl" else invoked("plan", str(path), "--memory", "2GiB")


TRY: dict[str, Callable[[random.Random, Path], str]] = {
    "gguf": try_gguf,
    "folder": try_folder,
    "template": try_template,
    "profile": try_profile,
}


def attempt(case: tuple[str, int]) -> str:
    """One case, of a kind and a seed."""
    kind, seed = case
    folder = Path(tempfile.mkdtemp())
    try:
        return TRY[kind](random.Random(f"{kind} {seed}"), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_the_inputs_that_are_mutated_below_are_sound(tmp_path: Path) -> None:
    for i, content in enumerate(gguf_bases()):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(content)
        pairs, table, end = read_header(content)
        assert write_header(pairs, table, content[-(-end // 32) * 32 :]) == content
        assert CliRunner().invoke(main, ["plan", str(path), "--memory", "2GiB"]).exit_code == 0
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in folder_base().items():
        (folder / name).write_bytes(data)
    assert CliRunner().invoke(main, ["plan", str(folder), "--memory", "2GiB"]).exit_code == 0
    assert Tokenizer(open_checkpoint(str(folder))).chat([{"role": "user", "content": "hi"}])


def test_a_mutated_input_is_used_or_refused_with_a_hint() -> None:
    cases = [(kind, seed) for kind, count in COUNTS.items() for seed in range(count)]
    random.Random(0).shuffle(cases)  # so that both workers have some of each
    found = faults(attempt, cases, workers=2, seconds=SECONDS, memory=MEMORY, most_faults=5)
    tried = {case: outcome for case, outcome in found.items() if outcome != "not reached"}
    words = "\n".join(f"{case}: {outcome}" for case, outcome in list(tried.items())[:40])
    assert not found, f"{len(tried)} of {len(cases)} fail, {len(found) - len(tried)} were not reached\n{words}"
