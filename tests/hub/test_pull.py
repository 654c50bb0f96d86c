"""Downloads: nothing twice, resumed after interruptions, all errors of the hub. All traffic stays on 127.0.0.1."""

import errno
import hashlib
import os
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub.constants
import pytest

from headrace.errors import HeadraceError, HubError, UsageError
from headrace.hub import Reference, cached_models, local_path, pull, removal
from support.hub import StandIn

MODEL = os.urandom(1 << 20)
OTHER = os.urandom(5000)
REPO = Reference(repo="org/model")
SMALL = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "README.md": b"# hello"}
SHARDS = {f"model-0000{i}-of-00002.safetensors": os.urandom(3000 + i) for i in (1, 2)}
SAFETENSORS = {
    **SMALL,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    **SHARDS,
    "pytorch_model.bin": os.urandom(4000),
}


@pytest.fixture(autouse=True)
def small_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks and no wait: the library loses unwritten chunks of 10 MiB, and waits a second before a retry."""
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture
def gguf(hub: StandIn) -> StandIn:
    hub.add("org/model", {"README.md": b"# hello", "m-Q4_K_M.gguf": MODEL, "m-Q8_0.gguf": OTHER})
    return hub


def failed(reference: Reference = REPO, match: str | None = None) -> HubError:
    with pytest.raises(HubError, match=match) as caught:
        pull(reference, say=None)
    assert caught.value.hint
    return caught.value


def partial(cache: Path) -> Path:
    return cache / "models--org--model" / "blobs" / f"{hashlib.sha256(MODEL).hexdigest()}.incomplete"


def test_a_gguf_file_is_fetched_once_and_nothing_else_is(gguf: StandIn, cache: Path) -> None:
    said: list[str] = []
    path = pull(REPO, say=said.append)

    assert Path(path).read_bytes() == MODEL
    assert path.startswith(str(cache))
    assert gguf.bytes_sent == {"m-Q4_K_M.gguf": len(MODEL)}
    assert "Q4_K_M of 2 GGUF models" in said[0]
    assert "fetching m-Q4_K_M.gguf (1 of 1)" in said[1]
    assert local_path(REPO) == path


def test_a_second_pull_sends_one_request_and_fetches_nothing(gguf: StandIn) -> None:
    path = pull(REPO, say=None)
    gguf.forget()

    assert pull(REPO, say=None) == path
    assert len(gguf.requests) == 1
    assert not gguf.bytes_sent


def test_another_file_of_the_repository_is_fetched_alone(gguf: StandIn) -> None:
    pull(REPO, say=None)
    gguf.forget()
    other = Reference(repo="org/model", file="q8_0")

    assert local_path(other) is None
    assert Path(pull(other, say=None)).read_bytes() == OTHER
    assert gguf.bytes_sent == {"m-Q8_0.gguf": len(OTHER)}
    assert local_path(other) is not None


def test_the_default_is_the_hubs_even_where_another_file_is_the_only_one_here(gguf: StandIn) -> None:
    pull(Reference(repo="org/model", file="Q8_0"), say=None)

    assert local_path(REPO) is None


def test_a_safetensors_model_is_a_folder_with_the_needed_files(hub: StandIn) -> None:
    hub.add("org/model", SAFETENSORS)
    folder = Path(pull(REPO, say=None))

    assert {path.name for path in folder.iterdir()} == set(SAFETENSORS) - {"README.md", "pytorch_model.bin"}
    assert all((folder / name).read_bytes() == content for name, content in SHARDS.items())
    assert set(hub.bytes_sent.values()) == {len(SAFETENSORS[name]) for name in hub.bytes_sent}
    assert local_path(REPO) == str(folder)


def test_a_model_that_lacks_a_file_is_not_local(hub: StandIn) -> None:
    hub.add("org/model", SAFETENSORS)
    folder = Path(pull(REPO, say=None))
    (folder / "model-00002-of-00002.safetensors").unlink()

    assert local_path(REPO) is None


def test_all_parts_of_a_split_are_fetched(hub: StandIn) -> None:
    parts = {f"q/b-Q8_0-0000{i}-of-00003.gguf": os.urandom(2000) for i in (1, 2, 3)}
    hub.add("org/model", parts)
    path = pull(REPO, say=None)

    assert path.endswith("q/b-Q8_0-00001-of-00003.gguf")
    assert sorted(hub.bytes_sent) == sorted(parts)


def test_a_new_commit_fetches_only_what_changed(gguf: StandIn) -> None:
    old = pull(REPO, say=None)
    gguf.add("org/model", {"README.md": b"# changed", "m-Q4_K_M.gguf": MODEL})
    gguf.forget()
    new = pull(REPO, say=None)

    assert new != old
    assert not gguf.bytes_sent
    assert local_path(REPO) == new


def test_a_whole_commit_hash_is_a_revision(gguf: StandIn) -> None:
    commit = Path(pull(REPO, say=None)).parent.name
    gguf.forget()
    pinned = Reference(repo="org/model", revision=commit)

    assert local_path(pinned) == pull(pinned, say=None)
    assert not gguf.bytes_sent


def test_a_cached_model_needs_no_network(gguf: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pull(REPO, say=None)
    gguf.forget()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    assert pull(REPO, say=None) == local_path(REPO) == path
    assert not gguf.requests


# Interruptions


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_that_breaks_once_goes_on_by_itself(gguf: StandIn, reset: bool) -> None:
    gguf.break_after, gguf.breaks, gguf.reset = 300_000, 1, reset

    assert Path(pull(REPO, say=None)).read_bytes() == MODEL
    assert gguf.bytes_sent["m-Q4_K_M.gguf"] <= len(MODEL) + 300_000
    if not reset:  # after a reset the client may have lost data in flight
        assert gguf.bytes_sent["m-Q4_K_M.gguf"] == len(MODEL)
        assert [r[2] for r in gguf.asked("/cdn/", "GET")] == ["", "bytes=300000-"]


def test_two_at_a_time_fetch_a_file_once(gguf: StandIn) -> None:
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: pull(REPO, say=None), range(2)))

    assert paths[0] == paths[1]
    assert gguf.bytes_sent == {"m-Q4_K_M.gguf": len(MODEL)}


def test_a_connection_that_always_breaks_is_an_error_and_the_next_call_fetches_the_rest(
    gguf: StandIn, cache: Path
) -> None:
    gguf.break_after, gguf.breaks = 0, -1
    error = failed(match="connection broke")
    assert "same command" in str(error.hint)

    partial(cache).write_bytes(MODEL[:700_000])
    gguf.break_after, gguf.breaks = None, 0
    gguf.forget()
    said: list[str] = []
    assert Path(pull(REPO, say=said.append)).read_bytes() == MODEL
    assert gguf.bytes_sent == {"m-Q4_K_M.gguf": len(MODEL) - 700_000}
    assert "of which 1 MB are here" in said[1]
    assert not partial(cache).exists()


def test_ctrl_c_keeps_the_partial_download(gguf: StandIn, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported = 0

    def interrupt(self: object, n: int) -> None:
        nonlocal reported
        reported += n
        if reported > 500_000:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tqdm.std.tqdm.update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pull(REPO, say=None)
    kept = partial(cache).stat().st_size
    assert kept == 500_000
    gguf.forget()
    assert Path(pull(REPO, say=None)).read_bytes() == MODEL
    assert gguf.bytes_sent == {"m-Q4_K_M.gguf": len(MODEL) - kept}


def test_a_server_that_ignores_ranges_sends_all_again_and_the_file_is_right(gguf: StandIn, cache: Path) -> None:
    partial(cache).parent.mkdir(parents=True)
    partial(cache).write_bytes(MODEL[:1000])
    gguf.ignore_ranges = True

    assert Path(pull(REPO, say=None)).read_bytes() == MODEL


def test_a_partial_file_that_is_complete_or_too_long_does_no_harm(gguf: StandIn, cache: Path) -> None:
    partial(cache).parent.mkdir(parents=True)
    partial(cache).write_bytes(MODEL + b"more")
    assert Path(pull(REPO, say=None)).read_bytes() == MODEL

    shutil.rmtree(cache)
    partial(cache).parent.mkdir(parents=True)
    partial(cache).write_bytes(MODEL)
    gguf.forget()
    assert Path(pull(REPO, say=None)).read_bytes() == MODEL
    assert not gguf.bytes_sent


# Errors


def test_a_file_whose_checksum_differs_is_an_error_and_is_not_kept(gguf: StandIn, cache: Path) -> None:
    gguf.corrupt = True
    failed(match="SHA-256 begins")

    assert not partial(cache).exists()
    assert local_path(REPO) is None
    gguf.corrupt = False
    assert Path(pull(REPO, say=None)).read_bytes() == MODEL


def test_a_file_of_another_length_than_listed_is_an_error_and_is_not_kept(gguf: StandIn, cache: Path) -> None:
    gguf.listed_too_long = 10
    failed(match=f"{len(MODEL)} bytes came instead of {len(MODEL) + 10}")

    assert not partial(cache).exists()


def test_a_disk_that_fills_up_meanwhile_is_an_error_that_says_how_to_go_on(
    gguf: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    assert "goes on" in str(failed(match="disk is full").hint)


def test_a_disk_without_space_is_an_error_before_the_download(gguf: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10_000))
    error = failed(match="needs 1 MB more")

    assert "0 MB free" in str(error)
    assert not gguf.bytes_sent


def test_an_unknown_repository_is_an_error_about_its_name(hub: StandIn) -> None:
    error = failed(match=r"no model org/model at http://127\.0\.0\.1")
    assert "private" in str(error.hint)
    assert "HF_TOKEN" in str(error.hint)


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_is_an_error_that_says_where_access_is_granted(hub: StandIn, status: int) -> None:
    hub.refuse = (status, {"X-Error-Code": "GatedRepo"})
    error = failed(match="gated")
    assert f"{hub.url}/org/model" in str(error.hint)
    assert "hf auth login" in str(error.hint)


def test_a_private_repository_opens_with_the_token_of_the_environment(
    gguf: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf.token = "hf_secret"
    failed(match="no model")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    assert Path(pull(REPO, say=None)).read_bytes() == MODEL
    assert set(gguf.tokens_seen_by_cdn) == {""}


def test_a_refused_token_an_absent_revision_and_a_broken_hub_are_told_apart(gguf: StandIn) -> None:
    failed(Reference(repo="org/model", revision="nowhere"), match="no revision `nowhere`")
    gguf.refuse = (403, {"X-Error-Message": "no"})
    failed(match="refuses the token")
    gguf.refuse = (503, {})
    failed(match="answers 503")


@pytest.mark.parametrize(
    ("headers", "when"),
    [
        ({"Retry-After": "90"}, "in 90 s"),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, "after Wed, 21 Oct"),
        ({"ratelimit": '"api";r=0;t=55'}, "in 55 s"),
        ({}, "in some minutes"),
    ],
)
def test_a_rate_limit_says_when_to_try_again(hub: StandIn, headers: dict[str, str], when: str) -> None:
    hub.refuse = (429, headers)
    assert when in str(failed(match="429").hint)


def test_an_uncached_model_with_the_network_off_is_an_error_without_a_request(
    gguf: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = failed(match="HF_HUB_OFFLINE")

    assert "headrace pull org/model" in str(error.hint)
    assert not gguf.requests


def test_no_network_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    error = failed(match="cannot reach")
    assert "network" in str(error.hint)


def test_a_server_that_is_no_hub_is_an_error(hub: StandIn) -> None:
    hub.refuse = (200, {"Content-Type": "text/html"})
    failed(match="does not answer as the hub|without its commit")


@pytest.mark.parametrize("name", ["../../x.gguf", "/nowhere/x.gguf"])
def test_a_file_name_that_leads_out_of_the_cache_is_an_error(hub: StandIn, cache: Path, name: str) -> None:
    hub.add("org/model", {name: os.urandom(2000)})
    with pytest.raises(HeadraceError):
        pull(REPO, say=None)
    assert not Path("/nowhere").exists()
    assert {path.name for path in cache.parent.rglob("*.gguf")} == set()


# The cache


def test_complete_models_are_listed_and_others_are_not(gguf: StandIn) -> None:
    assert cached_models() == []
    pull(Reference(repo="org/model", file="Q8_0"), say=None)
    gguf.add("org/safe", SAFETENSORS)
    folder = pull(Reference(repo="org/safe"), say=None)
    gguf.add("org/broken", SAFETENSORS)
    (Path(pull(Reference(repo="org/broken"), say=None)) / "model-00001-of-00002.safetensors").unlink()

    models = cached_models()
    assert [(m.name, m.format, m.files) for m in models] == [
        ("org/model:m-Q8_0.gguf", "gguf", 1),
        ("org/safe", "safetensors", 5),
    ]
    assert models[0].nbytes == len(OTHER)
    assert models[1].path == folder


def test_removing_a_file_leaves_the_others_and_removing_a_model_leaves_nothing(gguf: StandIn, cache: Path) -> None:
    kept = pull(REPO, say=None)
    gone = Reference(repo="org/model", file="Q8_0")
    path = Path(pull(gone, say=None))
    planned = removal(gone)
    assert (planned.nbytes, path.exists()) == (len(OTHER), True)
    planned.execute()
    assert not path.exists()
    assert local_path(REPO) == kept

    whole = removal(REPO)
    assert whole.nbytes == len(MODEL)
    whole.execute()
    assert not (cache / "models--org--model").exists()


def test_an_interrupted_download_can_be_removed(gguf: StandIn, cache: Path) -> None:
    gguf.break_after, gguf.breaks = 1000, -1
    gguf.reset = True
    failed()
    partial(cache).write_bytes(MODEL[:1000])
    planned = removal(REPO)
    assert planned.nbytes == 1000
    planned.execute()

    assert not (cache / "models--org--model").exists()


def test_removing_an_absent_model_is_an_error(hub: StandIn, gguf: StandIn) -> None:
    with pytest.raises(HubError, match="not in the cache"):
        removal(REPO)
    pull(REPO, say=None)
    with pytest.raises(UsageError, match="no GGUF model is called"):
        removal(Reference(repo="org/model", file="Q2_K"))
