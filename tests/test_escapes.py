"""Control characters from files are shown escaped, so that no name moves the cursor or forges a line."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from headrace.cli import main
from support.zoo.scripted import byte_level, write_scripted

pytestmark = [pytest.mark.zoo, pytest.mark.usefixtures("probed")]

# Effects of each: colours, the window's title, the clipboard, C1's own introducer, the line's start, the bell, a backspace,
# a delete, right-to-left text, and an isolate of it.
EVIL = "a\x1b[31mb\x1b]0;t\x07c\x1b]52;c;eA==\x1b\\d\x9b31me\rf\bg\x7fh\u202ei\u2066j"
RAW = tuple("\x1b\x07\x9b\r\b\x7f\u202e\u2066")
FORGED = "sound\nlicense      MIT\nhint: run something"


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return scripted(tmp_path)


def scripted(folder: Path, **options: Any) -> Path:
    vocabulary = byte_level()
    options = {**vocabulary, "eos": vocabulary["tokens"].index("<|im_end|>"), **options}
    return write_scripted(folder / "model.gguf", **options)


def on_a_terminal(*arguments: str | Path) -> Result:
    """Run a command whose escape sequences stay, as on a terminal; elsewhere click removes some."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], color=True)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def check_escaped(result: Result) -> None:
    """Check that no escape sequence is raw but our own colours."""
    found = [character for character in RAW if character in result.output]
    assert not found, (found, result.output)


def commands(path: Path) -> tuple[tuple[str | Path, ...], ...]:
    return (
        ("show", path),
        ("plan", path),
        ("plan", path, "--machine", "rtx-4090", "--prompt-tokens", "8", "--tokens", "8"),
        ("run", path, "h", "--raw", "-n", "2"),
    )


METADATA = {
    "the name": {"metadata": {"general.name": EVIL}},
    "the architecture": {"architecture": "llama" + EVIL},
    "a metadata key": {"metadata": {EVIL: 1}},
    "the pre-tokenizer": {"pre": EVIL},
    "the kind of tokenizer": {"model": EVIL},
    "the kind of RoPE scaling": {"metadata": {"llama.rope.scaling.type": EVIL, "llama.rope.scaling.factor": 2.0}},
    "a tensor that nothing uses": {"tensors": {f"blk.0.{EVIL}": np.zeros((4, 64), np.float32)}},
    "a tensor of no layer": {"tensors": {EVIL: np.zeros((4, 64), np.float32)}},
}


@pytest.mark.parametrize("place", METADATA)
def test_text_of_a_gguf_header_is_shown_escaped(place: str, tmp_path: Path) -> None:
    path = scripted(tmp_path, **METADATA[place])
    for arguments in commands(path):
        check_escaped(on_a_terminal(*arguments))


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (4 + 16, struct.pack("<I", 31)),  # a type that cannot be multiplied
        (4 + 16, struct.pack("<I", 999)),  # no type
        (0, struct.pack("<I", 9)),  # dimensions
        (4, struct.pack("<Q", 1 << 60)),  # elements
        (24, struct.pack("<Q", 1 << 40)),  # behind the end
        (24, struct.pack("<Q", 0)),  # over another
        (24, struct.pack("<Q", 7)),  # not aligned
    ],
)
def test_the_name_of_a_broken_tensor_is_shown_escaped(at: int, value: bytes, tmp_path: Path) -> None:
    path = scripted(tmp_path, tensors={"zz" + EVIL: np.zeros((4, 64), np.float32)})
    content = bytearray(path.read_bytes())
    start = content.index(b"zza") + len(("zz" + EVIL).encode()) + at
    content[start : start + len(value)] = value
    path.write_bytes(content)
    result = on_a_terminal("show", path)
    assert result.exit_code == 1
    check_escaped(result)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('%s') }}",
        "{{ 'x'|%s }}",
        "{%% %s %%}",
        "{{ x.%s }}{{ x | ",
        "{{ messages['%s'].x.y }}",
        "{%% include '%s' %%}",
        "{{ 1 + '%s' }}",
    ],
)
def test_text_of_a_template_in_its_error_is_shown_escaped(template: str, tmp_path: Path) -> None:
    path = scripted(tmp_path, template=template % EVIL.replace("\\", ""))
    result = on_a_terminal("run", path, "h", "-n", "1")
    assert result.exit_code in (1, 2)
    check_escaped(result)


def test_a_name_with_line_breaks_is_one_line(tmp_path: Path) -> None:
    path = scripted(tmp_path, metadata={"general.name": FORGED})
    for arguments in commands(path)[:3]:
        lines = on_a_terminal(*arguments).output.splitlines()
        assert not any(line.startswith(("license      MIT", "hint: run")) for line in lines)


def test_a_tensor_name_with_line_breaks_forges_no_hint(tmp_path: Path) -> None:
    path = scripted(tmp_path, tensors={"x\n\nhint: run something": np.zeros((4, 64), np.float32)})
    output = on_a_terminal("run", path, "h", "--raw", "-n", "1").output
    assert not any(line.startswith("hint: run something") for line in output.splitlines())


@pytest.mark.parametrize(
    "name", ["[bold]x[/bold]", "[/nothing]", "a:smile:b", "x\\", "\\[red]", "[link=http://x]y[/link]"]
)
def test_markup_in_a_name_is_plain_text(name: str, tmp_path: Path) -> None:
    path = scripted(tmp_path, metadata={"general.name": name})
    machine = tmp_path / "machine.toml"
    machine.write_text(f'name = {json.dumps(name)}\nparts = "rtx-4090 + 64GB"\n')
    for arguments in (("plan", path), ("show", path), ("plan", "llama-3-8b", "--machine", machine)):
        result = on_a_terminal(*arguments)
        assert result.exit_code == 0
        assert name in result.output


def test_a_machine_of_a_file_is_shown_escaped(tmp_path: Path) -> None:
    machine = tmp_path / "machine.toml"
    for text in ('name = "{}"\nparts = "rtx-4090 + 64GB"\n', 'parts = "{}"\n', 'parts = "rtx-4090"\n"{}" = 3\n'):
        machine.write_text(text.format(json.dumps(EVIL)[1:-1]))
        check_escaped(on_a_terminal("plan", "llama-3-8b", "--machine", machine))


def test_a_page_holds_no_script_and_no_control_character_of_a_name(tmp_path: Path) -> None:
    attack = "<script>x</script>'\"><img src=x onerror=y>" + EVIL
    path = scripted(tmp_path, metadata={"general.name": attack})
    result = on_a_terminal("plan", path, "--html", tmp_path / "page.html")
    assert result.exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert "<script>x" not in page
    assert "<img src=x" not in page
    assert not any(character in page for character in RAW)


def folder(place: Path, entries: Mapping[str, Any], config: Mapping[str, Any], **files: str) -> Path:
    """A folder with one tensor of a byte; `entries`, `config` and `files` replace the defaults."""
    place.mkdir()
    header = json.dumps(entries or {"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (place / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    (place / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    for name, content in files.items():
        (place / name.replace("__", ".")).write_text(content)
    return place


@pytest.mark.parametrize(
    ("entries", "config", "files"),
    [
        ({EVIL: {"dtype": "F32", "shape": [-1], "data_offsets": [0, 1]}}, {}, {}),
        ({EVIL: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, {}, {}),
        ({"x": {"dtype": EVIL, "shape": [1], "data_offsets": [0, 1]}}, {}, {}),
        ({}, {"model_type": EVIL}, {}),
        ({}, {"model_type": EVIL, "auto_map": {EVIL: EVIL}, "architectures": [EVIL]}, {}),
        ({}, {"quantization_config": {"quant_method": EVIL}}, {}),
        ({}, {"rope_scaling": {"rope_type": EVIL, "factor": 2}}, {}),
        ({}, {"num_hidden_layers": EVIL, "hidden_size": EVIL}, {}),
        ({}, {"hidden_act": EVIL, "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2}, {}),
        ({}, {}, {"model__safetensors__index__json": json.dumps({"weight_map": {"x": "\x1b[31m.safetensors"}})}),
        ({}, {}, {"model__safetensors__index__json": json.dumps({"weight_map": {EVIL: "model.safetensors"}})}),
        ({}, {}, {"generation_config__json": json.dumps({"temperature": EVIL, EVIL: 1})}),
    ],
)
def test_text_of_a_folder_is_shown_escaped(
    entries: Mapping[str, Any], config: Mapping[str, Any], files: Mapping[str, str], tmp_path: Path
) -> None:
    path = folder(tmp_path / "model", entries, config, **files)
    for arguments in (("show", path), ("plan", path), ("run", path, "h", "--raw", "-n", "1")):
        check_escaped(on_a_terminal(*arguments))


@pytest.mark.parametrize("name", ["a\x1b[31m.safetensors", "\u202e.bin", "x\x9b31m.gguf"])
def test_names_of_files_are_shown_escaped(name: str, tmp_path: Path) -> None:
    place = folder(tmp_path / "model", {}, {})
    (place / name).write_bytes(b"x")
    (place / "model.safetensors").rename(place / "other.safetensors")
    for arguments in (("show", place), ("plan", place), ("run", place, "h"), ("show", place / name)):
        check_escaped(on_a_terminal(*arguments))


def test_a_path_is_shown_escaped(tmp_path: Path) -> None:
    place = tmp_path / "a\x1b[31m\u202eb"
    place.mkdir()
    path = scripted(place)
    for arguments in (*commands(path), ("show", place / "nowhere.gguf"), ("run", place / "nowhere.gguf", "h")):
        check_escaped(on_a_terminal(*arguments))


def test_a_cached_model_is_listed_on_one_line_and_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--org--x" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "a\tb\n\x1b[31mc\u202e.gguf").write_bytes(b"GGUF")
    (snapshot / "b.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path / "hub"))
    result = on_a_terminal("list")
    check_escaped(result)
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert {line.count("\t") for line in lines} == {4}


def test_a_batch_shows_nothing_raw_of_its_requests(sound: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [{"custom_id": EVIL, "method": "POST", "url": EVIL, "body": {EVIL: EVIL, "prompt": EVIL}}, {EVIL: EVIL}]
    source.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + EVIL.replace("\r", "") + "\n")
    check_escaped(on_a_terminal("batch", source, tmp_path / "out.jsonl", "-m", sound))


def test_records_of_a_fit_are_shown_escaped(tmp_path: Path) -> None:
    records = tmp_path / "runs.jsonl"
    for line in ({"schema": EVIL}, {"schema": 1, EVIL: 1, "passes": []}, {"schema": 1, "passes": [{EVIL: 1}]}):
        records.write_text(json.dumps(line) + "\n")
        check_escaped(on_a_terminal("plan", "--fit", records))
