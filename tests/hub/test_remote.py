"""Headers read by range requests: `plan` and `show` need them of models that are not downloaded."""

import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from headrace.checkpoint import open_checkpoint
from headrace.errors import CheckpointError, HubError
from headrace.hub import Reference, remote_sources
from headrace.hub.remote import BLOCK_BYTES, MAX_READ_AHEAD, RemoteSource
from headrace.units import MIB
from support.hub import StandIn

REPO = Reference(repo="org/model")
WORDS = [f"word number {i} of the vocabulary" for i in range(60_000)]  # 2.5 MB of header


def write(path: Path, tensors: int = 1, words: list[str] | None = None, **options: int) -> Path:
    writer = GGUFWriter(path, "llama", **options)
    writer.add_uint32("llama.block_count", 5)
    writer.add_array("words", words or ["a", "b"])
    for number in range(tensors):
        writer.add_tensor(f"t{number}", np.full((1024, 1024), number, np.float32))  # 4 MiB
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_opening_a_model_at_the_hub_equals_opening_the_file_and_fetches_a_small_part(
    hub: StandIn, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", tensors=3)
    hub.add("org/model", {"m.gguf": path.read_bytes()})
    remote = remote_sources(REPO)
    checkpoint = open_checkpoint(remote.path, remote.open_source)
    local = open_checkpoint(path)

    assert (checkpoint.path, checkpoint.paths) == ("hf://org/model/m.gguf", ("hf://org/model/m.gguf",))
    assert checkpoint.metadata == local.metadata
    assert {t.name: (t.shape, t.type, t.offset, t.nbytes) for t in checkpoint.tensors.values()} == {
        t.name: (t.shape, t.type, t.offset, t.nbytes) for t in local.tensors.values()
    }
    assert checkpoint.array("words") == ["a", "b"]
    # One block of 12 MiB, for the header and the array in it.
    assert hub.bytes_sent == {"m.gguf": BLOCK_BYTES}
    assert remote.selection.nbytes == path.stat().st_size


def test_a_long_header_takes_few_requests_and_no_byte_twice(hub: StandIn, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tensors=2, words=WORDS)
    hub.add("org/model", {"m.gguf": path.read_bytes()})
    remote = remote_sources(REPO)
    checkpoint = open_checkpoint(remote.path, remote.open_source)

    assert checkpoint.array("words") == WORDS
    assert len(hub.asked("/cdn/")) == 2  # 1 MiB, then 2 MiB
    assert hub.bytes_sent["m.gguf"] == 3 * MIB


def test_all_parts_of_a_split_are_read(hub: StandIn, tmp_path: Path) -> None:
    write(tmp_path / "big.gguf", tensors=3, split_max_tensors=1)
    names = [f"big-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    hub.add("org/model", {f"Q/{name}": (tmp_path / name).read_bytes() for name in names})
    remote = remote_sources(REPO)
    checkpoint = open_checkpoint(remote.path, remote.open_source)

    assert checkpoint.paths == tuple(f"hf://org/model/Q/{name}" for name in names)
    assert sorted(checkpoint.tensors) == ["t0", "t1", "t2"]
    assert hub.bytes_sent == {f"Q/{name}": BLOCK_BYTES for name in names}


def test_a_part_that_the_repository_lacks_is_missing(hub: StandIn, tmp_path: Path) -> None:
    write(tmp_path / "big.gguf", tensors=3, split_max_tensors=1)
    names = [f"big-0000{i}-of-00003.gguf" for i in (1, 3)]
    hub.add("org/model", {"whole.gguf": b"x", **{name: (tmp_path / name).read_bytes() for name in names}})
    remote = remote_sources(Reference(repo="org/model", file="whole.gguf"))

    with pytest.raises(CheckpointError, match="1 of 3 parts are missing") as caught:
        open_checkpoint("hf://org/model/big-00001-of-00003.gguf", remote.open_source)
    assert "big-00002-of-00003" in str(caught.value)
    with pytest.raises(CheckpointError, match="not in the repository"):
        open_checkpoint("hf://org/model/absent.gguf", remote.open_source)


def test_a_file_that_is_no_gguf_is_an_error_that_names_its_format(hub: StandIn) -> None:
    hub.add("org/model", {"m.gguf": os.urandom(5000)})
    remote = remote_sources(Reference(repo="org/model", revision="main"))

    with pytest.raises(CheckpointError, match=r"hf://org/model@main/m\.gguf is not a GGUF file"):
        open_checkpoint(remote.path, remote.open_source)


def test_a_small_file_and_a_folder_are_read_too(hub: StandIn) -> None:
    hub.add("org/model", {"config.json": b'{"a": 1}', "model.safetensors": os.urandom(3000)})
    remote = remote_sources(REPO)
    source = remote.open_source(f"{remote.path}/config.json")

    assert source.pread(100, 0) == b'{"a": 1}'
    assert source.pread(3, 2) == b'a": '[:3]
    assert source.pread(10, source.size) == b""


def test_a_server_that_ignores_ranges_is_left_before_the_body(hub: StandIn) -> None:
    hub.add("org/model", {"m.gguf": os.urandom(8 * MIB)})
    hub.ignore_ranges = True
    remote = remote_sources(REPO)

    with pytest.raises(HubError, match="does not deliver bytes 0 to") as caught:
        open_checkpoint(remote.path, remote.open_source)
    assert "headrace pull org/model" in str(caught.value.hint)


def test_a_connection_that_breaks_once_is_tried_again_and_one_that_always_breaks_is_an_error(
    hub: StandIn, tmp_path: Path
) -> None:
    hub.add("org/model", {"m.gguf": write(tmp_path / "m.gguf").read_bytes()})
    hub.break_after, hub.breaks = 1000, 1
    remote = remote_sources(REPO)
    assert open_checkpoint(remote.path, remote.open_source).architecture == "llama"

    hub.breaks = -1
    again = remote_sources(REPO)
    with pytest.raises(HubError, match="connection broke"):
        open_checkpoint(again.path, again.open_source)


def test_a_network_that_is_switched_off_is_an_error_without_a_request(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        remote_sources(REPO)
    assert not hub.requests


def test_prefetch_doubles_on_consecutive_requests_and_restarts_elsewhere() -> None:
    content = os.urandom(40 * MIB + 7)
    asked: list[tuple[int, int]] = []

    def fetch(first: int, count: int) -> bytes:
        asked.append((first // MIB, -(-count // MIB)))
        return content[first : first + count]

    source = RemoteSource("x", len(content), fetch)
    for number in range(31):
        assert source.pread(MIB, number * MIB) == content[number * MIB : (number + 1) * MIB]
    assert asked == [(0, 1), (1, 2), (3, 4), (7, MAX_READ_AHEAD), (15, MAX_READ_AHEAD), (23, MAX_READ_AHEAD)]
    assert source.pread(100, len(content) - 7) == content[-7:]
    assert asked[-1] == (40, 1)
