"""Low limits of the operating system give an error that names them. Direct reads that fail fall back to buffered ones."""

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import headrace
from headrace.cli import main
from headrace.errors import HeadraceError
from headrace.plan import Profile
from headrace.plan.profile import save_profile
from headrace.units import MIB
from support.command import COMMAND
from support.zoo.scripted import byte_level, in_turn, write_scripted

pytestmark = pytest.mark.zoo

# Names of the limits: the option of ulimit, the constant, and words.
NAMES = {
    resource.RLIMIT_NPROC: ("ulimit -u", "RLIMIT_NPROC", "limit of processes", "limit of threads"),
    resource.RLIMIT_AS: ("ulimit -v", "RLIMIT_AS", "address space"),
    resource.RLIMIT_DATA: ("ulimit -d", "RLIMIT_DATA", "data segment"),
    resource.RLIMIT_NOFILE: ("ulimit -n", "RLIMIT_NOFILE", "open files"),
    resource.RLIMIT_FSIZE: ("ulimit -f", "RLIMIT_FSIZE", "File too large", "size of files"),
}
ANSWER = "hello"


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    """A model that answers "hello" to "X", in a file that every user of this machine may read."""
    vocabulary = byte_level(more=[("ello", 1)])
    ids = [vocabulary["tokens"].index(token) for token in ("X", "h", "ello", "<|im_end|>")]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield write_scripted(Path(folder) / "model.gguf", **vocabulary, eos=ids[-1], follows=in_turn(*ids))


@pytest.fixture(autouse=True)
def kept_profile(model: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_HOME", str(model.parent / "home"))
    save_profile(profile)


@contextmanager
def limited(limit: int, value: int) -> Iterator[None]:
    """Run a block of this process under a limit."""
    soft, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(limit, (soft, hard))


def run_limited(limit: int, value: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a separate process that is limited from its start."""

    def set_limit() -> None:
        resource.setrlimit(limit, (value, value))

    return subprocess.run(
        [*COMMAND, *arguments],
        preexec_fn=set_limit,
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )


def check_named(words: str, limit: int) -> None:
    assert "Traceback" not in words
    assert "GGML_ASSERT" not in words
    assert "Error: " in words
    assert any(name in words for name in NAMES[limit]), words


def check_result(result: Result, limit: int) -> None:
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    check_named(result.stderr, limit)


def check_answers(model: Path, profile: Profile) -> None:
    """Check that the earlier failure has left nothing behind."""
    with headrace.load(model, memory="2GiB", profile=profile) as loaded:
        assert loaded.generate("X", max_tokens=4, raw=True).text == ANSWER


@pytest.mark.parametrize("mebibytes", [300, 780])
def test_a_low_limit_of_the_address_space_is_named(mebibytes: int, model: Path) -> None:
    result = run_limited(resource.RLIMIT_AS, mebibytes * MIB, "run", str(model), "X", "--raw", "-n", "4", "-q")
    if result.returncode == 0:
        assert result.stdout == f"{ANSWER}\n"
    else:
        assert result.returncode == 1, result.stderr
        check_named(result.stderr, resource.RLIMIT_AS)


def test_a_low_limit_of_data_is_named(model: Path) -> None:
    result = run_limited(resource.RLIMIT_DATA, 300 * MIB, "run", str(model), "X", "--raw", "-n", "4", "-q")
    if result.returncode == 0:
        assert result.stdout == f"{ANSWER}\n"
    else:
        assert result.returncode == 1, result.stderr
        check_named(result.stderr, resource.RLIMIT_DATA)


# Threads of one process count as processes of its user; root has no limit. Modules are imported before.
AS_NOBODY = """
import os, resource, sys
from headrace.cli import main
from headrace import slim_import
library = slim_import.import_api()
import headrace.cli.run, headrace.model.gguf_mappings, transformers.models.llama.modeling_llama
model, further = sys.argv[1], int(sys.argv[2])
try:
    main(["run", model, "X", "--raw", "-n", "1", "-q"])
except SystemExit:
    pass
mine = len(os.listdir("/proc/self/task"))
resource.setrlimit(resource.RLIMIT_NPROC, (mine + further, mine + further))
if os.geteuid() == 0:
    os.setgroups([])
    os.setuid(54321)
main(["run", model, "X", "--raw", "-n", "4", "-q"])
"""


@pytest.mark.parametrize("further", [0, 1])
def test_a_low_limit_of_processes_is_named(further: int, model: Path) -> None:
    command = [sys.executable, "-c", AS_NOBODY, str(model), str(further)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode == 0:
        assert result.stdout.endswith(f"{ANSWER}\n")
    else:
        assert result.returncode == 1, result.stderr
        check_named(result.stderr, resource.RLIMIT_NPROC)


@pytest.mark.parametrize("started", range(6))
def test_threads_that_cannot_start_are_an_error_and_leave_no_others(
    started: int, model: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, left, start = threading.active_count(), [started], threading.Thread.start

    def limited_start(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited_start)
        result = CliRunner().invoke(main, ["run", str(model), "X", "--raw", "-n", "4", "-q"])
    if result.exit_code == 0:
        assert result.stdout == f"{ANSWER}\n"
    else:
        check_result(result, resource.RLIMIT_NPROC)
    assert threading.active_count() <= before
    check_answers(model, profile)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_a_machine_that_cannot_start_a_probe_process_uses_assumed_rates(
    number: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(subprocess, "run", refuse)
    result = CliRunner().invoke(main, ["run", str(model), "X", "--raw", "-n", "4"])
    assert result.exit_code == 0, repr(result.exception)
    assert result.stdout == f"{ANSWER}\n"
    assert "could not be measured" in result.stderr


def test_memory_that_cannot_be_reserved_is_an_error(
    model: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("mmap.mmap", refuse)
        result = CliRunner().invoke(main, ["run", str(model), "X", "--raw", "-n", "4", "-q"])
    check_result(result, resource.RLIMIT_AS)
    check_answers(model, profile)


@pytest.mark.parametrize("place", ["transformers.AutoModelForCausalLM.from_config", "headrace.api.Tokenizer"])
def test_memory_that_runs_out_while_loading_does_not_blame_the_file(
    place: str, model: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(place, refuse)
        result = CliRunner().invoke(main, ["run", str(model), "X", "--raw", "-n", "4", "-q"])
    check_result(result, resource.RLIMIT_AS)
    assert "damaged" not in result.stderr
    check_answers(model, profile)


@pytest.mark.parametrize("further", range(5))
def test_a_low_limit_of_open_files_is_named(further: int, model: Path, profile: Profile) -> None:
    arguments = ["run", str(model), "X", "--raw", "-n", "4", "-q"]
    CliRunner().invoke(main, arguments)  # imports
    used = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    with limited(resource.RLIMIT_NOFILE, used + further):
        result = CliRunner().invoke(main, arguments)
    if result.exit_code == 0:
        assert result.stdout == f"{ANSWER}\n"
    else:
        check_result(result, resource.RLIMIT_NOFILE)
    check_answers(model, profile)


@pytest.mark.parametrize("command", ["plan {model} --html {out}", "run {model} X --raw --trace {out}"])
def test_a_low_limit_of_the_size_of_files_is_named(command: str, model: Path, tmp_path: Path) -> None:
    arguments = [word.format(model=model, out=tmp_path / "out") for word in command.split()]
    with limited(resource.RLIMIT_FSIZE, 0):
        result = CliRunner().invoke(main, arguments)
    check_result(result, resource.RLIMIT_FSIZE)


# Direct reads


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@contextmanager
def direct_reads_fail(number: int, after: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file system that opens files for direct reads, and fails them after the first `after`."""
    real, left = os.preadv, [after]

    def preadv(descriptor: int, buffers: Any, offset: int, *rest: int) -> int:
        if is_direct(descriptor):
            if not left[0]:
                raise OSError(number, os.strerror(number))
            left[0] -= 1
        return real(descriptor, buffers, offset, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        yield


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_reads_are_buffered_where_direct_ones_fail(
    number: int, after: int, model: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        direct_reads_fail(number, after, monkeypatch),
        headrace.load(model, memory="2GiB", profile=profile) as loaded,
    ):
        assert loaded.generate("X", max_tokens=4, raw=True).text == ANSWER
        if not after:
            assert any("page cache" in reason and "O_DIRECT" in reason for reason in loaded.plan.reasons)


def test_run_says_that_reads_are_buffered(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["run", str(model), "X", "--raw", "-n", "4"]
    with direct_reads_fail(errno.EINVAL, 0, monkeypatch):
        result = CliRunner().invoke(main, arguments)
        as_json = CliRunner().invoke(main, [*arguments, "--json", "-q"])
    assert result.stdout == f"{ANSWER}\n", result.stderr
    assert "page cache" in result.stderr
    assert any("page cache" in reason for reason in json.loads(as_json.stdout)["plan"]["reasons"])


def test_a_disk_that_fails_is_still_an_error(model: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        direct_reads_fail(errno.EIO, 0, monkeypatch),
        pytest.raises(HeadraceError, match=os.strerror(errno.EIO)),
        headrace.load(model, memory="2GiB", profile=profile) as loaded,
    ):
        loaded.generate("X", max_tokens=4, raw=True)
