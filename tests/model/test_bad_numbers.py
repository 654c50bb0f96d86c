"""Impossible values in GGUF metadata, a folder's config, the machine's profile and records of earlier runs.

Each is refused with a hint, or ignored; none causes a traceback, a hang or a flood of memory.
"""

import copy
import io
import json
import math
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

import headrace
from headrace.checkpoint import open_checkpoint
from headrace.cli import main
from headrace.errors import HeadraceError
from headrace.model.tokenizer import Tokenizer
from headrace.plan import Profile, guessed_profile
from headrace.plan.profile import load_profile, profile_path, save_profile
from headrace.plan.record import PassGroup, RunRecord, keep_record, records_path
from headrace.plan.routing import Routing, load_routing, routing_path, save_routing
from headrace.units import GIB
from support.bounded import FINE, described, faults, verdict
from support.zoo.folders import tiny_model, write_folder
from support.zoo.gguf_files import FAMILIES, random_model, write_gguf
from support.zoo.scripted import byte_level, write_scripted

pytestmark = pytest.mark.zoo

MOE, DENSE = "qwen3moe", "llama"
# Values that GGUF's types can hold.
VALUES: tuple[Any, ...] = (0, -1, 1 << 31, (1 << 63) - 1, True, "word", math.nan, [-1, 1 << 40])
OF_ALL = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor", "rope.scaling.original_context_length", "attention.sliding_window", "vocab_size",
)  # fmt: skip
OF_EXPERTS = (
    "expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_count",
    "expert_shared_feed_forward_length",
    "expert_group_count", "expert_group_used_count", "expert_gating_func", "expert_weights_scale",
    "leading_dense_block_count",
    "nextn_predict_layers", "decoder_start_token_id", "decoder_block_count",
)  # fmt: skip


def invoke(*arguments: object) -> str:
    """The fault in how the command ends: an exit code with a hint is fine, an uncaught exception is not."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return described(result.exception)
    if result.exit_code and "hint" not in result.stderr.lower() and "try" not in result.stderr.lower():
        return f"no hint: {result.stderr}"[:300]
    return FINE


def load(path: Path, profile: Profile) -> Callable[[], object]:
    """Load a model and generate."""

    def use() -> None:
        with headrace.load(str(path), memory="2GiB", profile=profile, context_tokens=32) as model:
            model.generate("hi", max_tokens=2)

    return use


def rewritten(path: Path, key: str, value: Any) -> None:
    """Change the value of a key in a GGUF file by rewriting its header."""
    reader = gguf.GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(path.with_suffix(".new"), architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", key):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    if isinstance(value, list):
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.INT64)
    else:
        kinds = gguf.GGUFValueType
        whole = kinds.INT64 if isinstance(value, int) and value < 1 << 63 else kinds.UINT64
        kind = {bool: kinds.BOOL, str: kinds.STRING, float: kinds.FLOAT64}.get(type(value), whole)
        writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").rename(path)


@cache
def sound_file(architecture: str) -> bytes:
    """The file of a tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        return write_gguf(random_model(architecture), architecture, Path(folder) / "tiny.gguf").read_bytes()


@cache
def with_number(architecture: str, key: str) -> tuple[bytes, int]:
    """(the same file with a 64-bit number under a key, the number's offset)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        path.write_bytes(sound_file(architecture))
        rewritten(path, key, MARK)
        content = path.read_bytes()
    at = content.index(MARK.to_bytes(8, "little"))
    return content, at


MARK = 0x1122334455667788


def write_with(path: Path, architecture: str, key: str, value: Any) -> None:
    """Write a tiny model with this value under a key."""
    if isinstance(value, int) and not isinstance(value, bool):
        content, at = with_number(architecture, key)
        kind = gguf.GGUFValueType.INT64 if value < 1 << 63 else gguf.GGUFValueType.UINT64
        data = bytearray(content)
        data[at - 4 : at] = int(kind).to_bytes(4, "little")
        data[at : at + 8] = (value % (1 << 64)).to_bytes(8, "little")
        path.write_bytes(data)
    else:
        path.write_bytes(sound_file(architecture))
        rewritten(path, key, value)


Case = tuple[str, str, int]  # architecture, key, number of the value


def cases(architectures: Sequence[str]) -> list[Case]:
    """All cases of these architectures."""
    keys = {name: {*FAMILIES[name].metadata, *OF_ALL, *(OF_EXPERTS if name == MOE else ())} for name in architectures}
    full = [(name, f"{name}.{key}") for name in architectures for key in keys[name]]
    return [(name, key, i) for name, key in full for i in range(len(VALUES))]


def plan_case(case: Case) -> str:
    """Runs in a worker of bounded memory."""
    architecture, key, number = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_with(path, architecture, key, VALUES[number])
        return invoke("plan", path, "--memory", "2GiB")


def generate_case(case: Case) -> str:
    """Runs in a worker of bounded memory."""
    architecture, key, number = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_with(path, architecture, key, VALUES[number])
        return verdict(load(path, guessed_profile()))


def tokenize_case(case: Case) -> str:
    """Runs in a worker of bounded memory."""
    _, key, number = case
    with tempfile.TemporaryDirectory() as folder:
        path = write_scripted(Path(folder) / "model.gguf", **byte_level(), eos=258)
        rewritten(path, key, VALUES[number])
        return verdict(lambda: Tokenizer(open_checkpoint(str(path))).chat([{"role": "user", "content": "hi"}]))


def named(found: dict[Case, str]) -> dict[str, str]:
    """The faults by key and value."""
    return {f"{key} = {VALUES[number]!r}"[:80]: what for (_, key, number), what in found.items()}


def test_any_value_of_a_key_yields_a_plan_or_a_refusal() -> None:
    tried = cases((DENSE, MOE))
    assert not named(faults(plan_case, tried, seconds=20, memory=GIB))


LOADED = ("context_length", "expert_used_count", "expert_count", "attention.head_count_kv", "block_count", "vocab_size")


def test_any_value_of_a_key_yields_output_or_a_refusal() -> None:
    tried = [(MOE, f"{MOE}.{key}", i) for key in LOADED for i in range(0, len(VALUES), 2)]
    assert not named(faults(generate_case, tried, seconds=20, memory=3 * GIB))


def test_any_value_of_a_tokenizer_key_yields_tokens_or_a_refusal() -> None:
    names = (
        "bos_token_id",
        "eos_token_id",
        "unknown_token_id",
        "padding_token_id",
        "eot_token_id",
        "add_bos_token",
        "token_type",
    )
    keys = [f"tokenizer.ggml.{name}" for name in names]
    tried = [(DENSE, key, i) for key in keys for i in range(len(VALUES))]
    assert not named(faults(tokenize_case, tried, seconds=20, memory=GIB))


@pytest.mark.parametrize("value", [0, -1])
def test_a_context_of_no_tokens_is_refused_by_name(value: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_with(path, DENSE, f"{DENSE}.context_length", value)
    result = CliRunner().invoke(main, ["plan", str(path), "--memory", "2GiB"])
    assert result.exit_code == 1
    assert "context" in result.stderr


@pytest.mark.parametrize("value", [-1, 0, 1 << 20, (1 << 63) - 1])
def test_an_impossible_number_of_experts_per_token_is_refused_by_name(value: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_with(path, MOE, f"{MOE}.expert_used_count", value)
    result = CliRunner().invoke(main, ["plan", str(path), "--memory", "2GiB"])
    assert result.exit_code == 1
    assert "expert" in result.stderr


# Folders

IN_JSON: tuple[Any, ...] = (
    None, 0, -1, 3, 1 << 31, 1 << 63, 10**400, 1e308, math.nan, math.inf, True, "word", [], [-1], [-1, 1 << 63,
    None], {},
)  # fmt: skip
IN_SMALL_FILES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "eos_token_id",
    "do_sample",
    "model_max_length",
    "chat_template",
)


@cache
def folder_of(name: str) -> Path:
    """A folder with a tiny model, kept for the process."""
    return write_folder(tiny_model(name), Path(tempfile.mkdtemp()) / "model")


def plan_folder_case(case: tuple[str, str, str, int]) -> str:
    """Runs in a worker of bounded memory: a value in one of the JSON files of a folder."""
    name, file, key, number = case
    path = folder_of(name) / file
    before = path.read_bytes() if path.exists() else None
    content = json.loads(before) if before else {"do_sample": True}
    try:
        path.write_text(json.dumps(content | {key: IN_JSON[number]}))
        return invoke("plan", folder_of(name), "--memory", "2GiB")
    finally:
        path.unlink() if before is None else path.write_bytes(before)


def test_any_value_in_a_folders_json_yields_a_plan_or_a_refusal() -> None:
    names = ("llama", "qwen3_moe")
    found = {name: json.loads((folder_of(name) / "config.json").read_text()) for name in names}
    places = [(name, "config.json", key) for name in names for key, v in found[name].items() if not isinstance(v, str)]
    small = ("generation_config.json", "tokenizer_config.json")
    places += [("llama", file, key) for file in small for key in IN_SMALL_FILES]
    tried = [(*place, i) for place in places for i in range(len(IN_JSON))]
    wrong = faults(plan_folder_case, tried, seconds=20, memory=GIB)
    assert not {f"{case[1:3]} = {IN_JSON[case[3]]!r}"[:90]: what for case, what in wrong.items()}


# The profile of the machine

DAMAGE: tuple[Any, ...] = (
    None, 0, -1, True, "x", "", 1e308, 1e-308, 5e-324, 1e18, 1 << 63, 10**400, math.nan, math.inf, [], [1], [1, 2,
    3], {}, {"a": 1},
    {"0": 1.0}, {"": 1.0}, {"1": None}, {"1": "x"}, {"1": True}, {"1": 10**400}, {"1": 1e-320}, {"1e3": 5.0},
    {"-1": 5.0}, {"²": 1.0},
    {"٣": 1e9}, {"1_0": 1e9}, {" 1": 1e9}, {"9" * 5000: 1e9}, {"4": 1e9}, {"Q4_K": {"16": 1e9}},
    {"Q4_K": {"1": 1e9}}, {"": {"1": 1e9}},
)  # fmt: skip
ABSENT = object()


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a JSON value."""
    if place:
        yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*place, key))


def changed(value: Any, place: tuple[Any, ...], other: Any) -> Any:
    """A copy with another value at a place."""
    found = copy.deepcopy(value)
    outer = found
    for key in place[:-1]:
        outer = outer[key]
    if other is ABSENT:
        del outer[place[-1]]
    else:
        outer[place[-1]] = other
    return found


def full(profile: Profile) -> dict[str, Any]:
    """A profile with something in every field."""
    measured = replace(
        profile,
        source="measured 2026-01-01",
        disk_bytes_per_s={"1": 1e9},
        repacked_weights_per_s={"Q4_K": {"1": 2e10, "4": 1e10}},
        factors={"disk": 1.1, "kernel": 1.0, "layer": 1.0, "io_cpu": 0.3},
        spread=(0.8, 1.2),
        probed_at="2026-01-01T00:00:00",
    )
    return json.loads(json.dumps(asdict(measured)))


def test_the_profile_that_later_tests_damage_is_used(profile: Profile) -> None:
    kept = full(profile)
    save_profile(Profile(**(kept | {"spread": (0.8, 1.2)})))
    found = load_profile()
    assert found is not None
    assert json.loads(json.dumps(asdict(found))) == kept


def test_a_damaged_profile_yields_a_plan_or_a_refusal(profile: Profile, tmp_path: Path) -> None:
    """The plan uses the profile, or ignores it, or is refused with a hint."""
    path = tmp_path / "model.gguf"
    path.write_bytes(sound_file(DENSE))
    kept = full(profile)
    profile_path().parent.mkdir(parents=True, exist_ok=True)
    wrong = {}
    for place in places(kept):
        for value in (*DAMAGE, ABSENT):
            profile_path().write_text(json.dumps(changed(kept, place, value)))
            if load_profile() is None:
                continue
            outcome = invoke("plan", path, "--memory", "2GiB")
            if outcome != FINE:
                wrong[f"{place} = {value!r}"[:80]] = outcome
    assert not wrong


@pytest.mark.parametrize(
    "content",
    [
        b"", b"null", b"[]", b"3", b'"x"', b"{}", b"{", b"\xff\xfe", b"\x00" * 100, b"[" * 100_000,
        b'{"a":' * 100_000, b"9" * 10_000, b'{"machine": NaN}', b'{"source": "x", "source": 3}', b"\xef\xbb\xbf{}",
        b'{"self": 1}', b'{"schema": 5, "\\ud800": 1}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_profile_is_ignored(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(sound_file(DENSE))
    profile_path().parent.mkdir(parents=True, exist_ok=True)
    profile_path().write_bytes(content)
    assert CliRunner().invoke(main, ["plan", str(path), "--memory", "2GiB"]).exit_code == 0
    assert invoke("fit") == FINE


# Records of runs


def record(profile: Profile) -> RunRecord:
    group = PassGroup(
        rows=1, count=5, seconds=0.2, read_bytes=1e9, stall_s=0.01, draft_s=0.0, disk_s=0.1, kernel_s=0.05, layer_s=0.01
    )
    groups = tuple(replace(group, rows=rows) for rows in (1, 2, 3, 4))
    return RunRecord(
        machine=profile.machine, model="m", weights_bytes=1, pinned_bytes=1, streamed_bytes=1, budget_bytes=1,
    layers=1, sequences=1,
        draft="none", tokens=1, ttft_s=1.0, predicted_ttft_s=1.0, s_per_token=0.1, predicted_s_per_token=0.1,
    drafted=0, accepted=0,
        passes=groups, factors={"disk": 1.0, "kernel": 1.0, "layer": 1.0, "io_cpu": 0.3},
    probed_at="2026-01-01T00:00:00",
    )  # fmt: skip


def test_a_damaged_record_yields_a_fit_or_a_refusal(profile: Profile) -> None:
    save_profile(Profile(**(full(profile) | {"spread": (0.8, 1.2)})))
    keep_record(record(profile))
    assert invoke("fit") == FINE
    kept = json.loads(records_path().read_text())
    wrong = {}
    for place in places(kept):
        if place[0] == "passes" and len(place) > 1 and place[1]:
            continue  # the groups are equal
        for value in (*DAMAGE[:18], ABSENT):
            records_path().write_text(json.dumps(changed(kept, place, value)) + "\n")
            outcome = invoke("fit")
            if outcome != FINE:
                wrong[f"{place} = {value!r}"[:80]] = outcome
            save_profile(Profile(**(full(profile) | {"spread": (0.8, 1.2)})))
    assert not wrong


# Routing statistics of earlier runs


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, content in entries.items():
            file.writestr(f"{name}.npy", content)
    return out.getvalue()


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode("latin-1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


SCORES = np.full((2, 8), 0.25, np.float32)
GOOD = {"scores": SCORES, "cached": 3, "hit_rate": 0.5}


def unsupported_method() -> bytes:
    content = bytearray(npz(**GOOD))
    for at in range(len(content) - 4):
        if content[at : at + 4] == b"PK\x03\x04":
            content[at + 8] = 99
        if content[at : at + 4] == b"PK\x01\x02":
            content[at + 10] = 99
    return bytes(content)


def encrypted() -> bytes:
    content = bytearray(npz(**GOOD))
    for at in range(len(content) - 4):
        if content[at : at + 4] == b"PK\x03\x04":
            content[at + 6] |= 1
        if content[at : at + 4] == b"PK\x01\x02":
            content[at + 8] |= 1
    return bytes(content)


def bad_deflate() -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **GOOD)
    content = bytearray(out.getvalue())
    at = content.index(b"scores.npy") + len("scores.npy")
    content[at + 20 : at + 60] = bytes(40)
    return bytes(content)


DESCR = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"
ROUTINGS: dict[str, Callable[[], bytes]] = {
    "cached is infinite": lambda: npz(**(GOOD | {"cached": math.inf})),
    "cached is no number": lambda: npz(**(GOOD | {"cached": math.nan})),
    "cached is negative": lambda: npz(**(GOOD | {"cached": -5})),
    "cached is huge": lambda: npz(**(GOOD | {"cached": 1 << 62})),
    "cached is a text": lambda: npz(**(GOOD | {"cached": "x"})),
    "cached is complex": lambda: npz(**(GOOD | {"cached": 1j})),
    "cached is a date": lambda: npz(**(GOOD | {"cached": np.datetime64("2020-01-01")})),
    "cached is many": lambda: npz(**(GOOD | {"cached": np.arange(3)})),
    "cached is nothing": lambda: npz(**(GOOD | {"cached": np.zeros(0)})),
    "the hit rate is no number": lambda: npz(**(GOOD | {"hit_rate": math.nan})),
    "the hit rate is 0": lambda: npz(**(GOOD | {"hit_rate": 0.0})),
    "the hit rate is 1": lambda: npz(**(GOOD | {"hit_rate": 1.0})),
    "the hit rate is tiny": lambda: npz(**(GOOD | {"hit_rate": 5e-324})),
    "the hit rate is a text": lambda: npz(**(GOOD | {"hit_rate": "x"})),
    "scores of another shape": lambda: npz(**(GOOD | {"scores": np.zeros((1, 1), np.float32)})),
    "scores of nothing": lambda: npz(**(GOOD | {"scores": np.zeros((0, 0), np.float32)})),
    "scores that are no numbers": lambda: npz(**(GOOD | {"scores": SCORES * np.nan})),
    "scores of another type": lambda: npz(**(GOOD | {"scores": SCORES.astype(np.float64)})),
    "pickled scores": lambda: npz(**(GOOD | {"scores": np.array([{}], object)})),
    "a key is missing": lambda: npz(scores=SCORES),
    "another method of compression": unsupported_method,
    "encrypted": encrypted,
    "damaged compression": bad_deflate,
    "cut off": lambda: npz(**GOOD)[:-40],
    "nothing": lambda: b"",
    "zeros": lambda: bytes(1000),
    "a plain array": lambda: npy(DESCR % "(2, 8)", SCORES.tobytes()),
    "a header that is no dict": lambda: zipped({"scores": npy("[")}),
    "a header with a zero byte": lambda: zipped({"scores": npy("{'descr\0")}),
    "a header of parentheses": lambda: zipped({"scores": npy("(" * 9000)}),
    "a header of minus signs": lambda: zipped({"scores": npy("-" * 9000 + "1")}),
    "a huge shape": lambda: zipped({"scores": npy(DESCR % "(1099511627776, 8)")}),
    "a shape beyond all bounds": lambda: zipped({"scores": npy(DESCR % f"({1 << 62}, {1 << 62})")}),
    "a negative shape": lambda: zipped({"scores": npy(DESCR % "(-1, 8)")}),
    "a shape of 64 GiB that is compressed": lambda: zipped(
        {"scores": npy(DESCR % "(2147483648, 8)", bytes(1 << 22))}, zipfile.ZIP_DEFLATED
    ),
}  # fmt: skip


def test_the_routing_that_later_tests_damage_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(sound_file(MOE))
    checkpoint = open_checkpoint(str(path))
    save_routing(checkpoint, Routing(scores=SCORES, cached=3, hit_rate=0.5))
    found = load_routing(checkpoint)
    assert found is not None
    assert (found.cached, found.hit_rate) == (3, 0.5)


LOADED_WITH = ("cached is negative", "cached is huge", "the hit rate is tiny", "scores of another shape", "encrypted")


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_damaged_routing_file_is_ignored(name: str, profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(sound_file(MOE))
    kept = routing_path(open_checkpoint(str(path)))
    kept.parent.mkdir(parents=True)
    content = ROUTINGS[name]()
    shape = experts_of(path)
    if name.startswith(("cached", "the hit rate")):  # with this model's shape, so that the values are used
        values = dict(np.load(io.BytesIO(content)))
        content = npz(**(values | {"scores": np.full(shape, 0.25, np.float32)}))
    kept.write_bytes(content)
    result = CliRunner().invoke(main, ["plan", str(path), "--memory", "2GiB"])
    assert result.exit_code == 0, repr(result.exception)
    if name in LOADED_WITH:
        assert verdict(load(path, profile)) == FINE


def experts_of(path: Path) -> tuple[int, int]:
    """(layers, experts) of the MoE model's file."""
    checkpoint = open_checkpoint(str(path))
    return checkpoint.number("block_count"), checkpoint.number("expert_count")


def test_the_models_of_these_tests_generate(profile: Profile, tmp_path: Path) -> None:
    for name in (DENSE, MOE):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(sound_file(name))
        try:
            load(path, profile)()
        except HeadraceError as error:
            pytest.fail(f"{name}: {error}")
