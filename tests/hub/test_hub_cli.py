"""`pull`, `list`, `show` and `rm` in a second process, with the environment that users set."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save

from headrace.cli import main
from support.command import COMMAND
from support.hub import StandIn, serve


@pytest.fixture
def standin(tmp_path: Path):  # type: ignore[no-untyped-def]
    hub = StandIn(license="apache-2.0")
    server = serve(hub)
    yield hub
    if hub.hold is not None:
        hub.hold.set()
    server.shutdown()
    server.server_close()


def environment(hub: StandIn, home: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "NO_PROXY": "127.0.0.1,localhost", **more}


def headrace(hub: StandIn, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env=environment(hub, home, **more),
    )


def test_a_model_of_the_hub_is_forecast_for_another_machine_by_its_header(
    standin: StandIn, tmp_path: Path, tiny_llama: Path
) -> None:
    standin.add("org/tiny", {"README.md": b"# tiny", "tiny-Q8_0.gguf": tiny_llama.read_bytes()})
    result = headrace(
        standin,
        tmp_path,
        "plan",
        "org/tiny",
        "--machine",
        "rtx-4090 + 64GB",
        "--tokens",
        "8",
        "--prompt-tokens",
        "8",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["decode"]["tok_per_s"]["expected"] > 0


def test_the_environment_sets_the_hub_and_the_cache(standin: StandIn, tmp_path: Path, tiny_llama: Path) -> None:
    standin.add("org/tiny", {"README.md": b"# tiny", "tiny-Q8_0.gguf": tiny_llama.read_bytes()})
    standin.token = "hf_secret"
    assert headrace(standin, tmp_path, "pull", "org/tiny").returncode == 1
    pulled = headrace(standin, tmp_path, "pull", "org/tiny", HF_TOKEN="hf_secret")
    path = Path(pulled.stdout.strip())

    assert pulled.returncode == 0, pulled.stderr
    assert path.read_bytes() == tiny_llama.read_bytes()
    assert path.is_relative_to(tmp_path / "hf" / "hub")
    assert "the only GGUF model there" in pulled.stderr
    assert "%" not in pulled.stderr  # no bar where there is no terminal
    standin.forget()
    shown = headrace(standin, tmp_path, "show", "org/tiny", HF_HUB_OFFLINE="1")
    assert "llama" in shown.stdout
    assert not standin.requests


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_a_model_is_shown_pulled_listed_and_removed(hub: StandIn, tiny_llama: Path) -> None:
    hub.license = "apache-2.0"
    hub.add("org/tiny", {"README.md": b"# tiny", "tiny-Q8_0.gguf": tiny_llama.read_bytes()})
    size = tiny_llama.stat().st_size
    remote = json.loads(run("show", "org/tiny", "--json").stdout)
    assert (remote["architecture"], remote["layers"], remote["remote"]) == ("llama", 3, True)
    assert remote["license"] == "apache-2.0"
    assert remote["files"] == [{"name": "tiny-Q8_0.gguf", "bytes": size}]

    path = json.loads(run("pull", "org/tiny", "--json").stdout)["path"]
    local = json.loads(run("show", "org/tiny", "--json").stdout)
    assert local == {**remote, "model": "org/tiny", "remote": False, "path": path, "license": None}

    rows = [line.split("\t") for line in run("list").stdout.splitlines()]
    assert rows[0] == ["name", "format", "files", "bytes", "last_used"]
    assert rows[1][:4] == ["org/tiny:tiny-Q8_0.gguf", "gguf", "1", str(size)]
    assert [model["path"] for model in json.loads(run("list", "--json").stdout)["models"]] == [path]

    refused = run("rm", "org/tiny")
    assert (refused.exit_code, Path(path).exists()) == (2, True)
    assert "--yes" in refused.stderr
    removed = run("rm", "org/tiny", "--yes")
    assert (removed.exit_code, Path(path).exists()) == (0, False)
    assert "frees" in removed.stderr
    assert run("list", "--json").stdout == '{"models": []}\n'


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(standin: StandIn, tmp_path: Path) -> None:
    content = os.urandom(24 << 20)
    standin.add("org/big", {"m.gguf": content})
    # The library writes in chunks of 10 MiB: one is on the disk when the server falls silent.
    standin.break_after, standin.breaks, standin.hold = 15 << 20, -1, threading.Event()
    process = subprocess.Popen(
        [*COMMAND, "pull", "org/big"],
        env=environment(standin, tmp_path),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    deadline = time.monotonic() + 30
    while kept_bytes(tmp_path) < 10 << 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=30)

    assert process.returncode == 130, words
    assert "goes on where it was" in words
    kept = kept_bytes(tmp_path)
    assert kept >= 10 << 20
    standin.hold.set()
    standin.breaks = 0
    standin.forget()
    again = headrace(standin, tmp_path, "pull", "org/big", "--json")
    assert Path(json.loads(again.stdout)["path"]).read_bytes() == content
    assert standin.bytes_sent == {"m.gguf": len(content) - kept}


def kept_bytes(home: Path) -> int:
    return sum(path.stat().st_size for path in home.rglob("*.incomplete"))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["pull", "./model.gguf"], 2, "is not the name of a model"),
        (["pull", "org/absent"], 1, "no model org/absent"),
        (["rm", "org/absent", "--yes"], 1, "not in the cache"),
        (["show", "absent.gguf"], 1, "there is no file absent.gguf"),
        (["show", "org/absent"], 1, "no model org/absent"),
    ],
)
def test_errors_have_a_hint_and_an_exit_code(hub: StandIn, arguments: list[str], code: int, said: str) -> None:
    result = run(*arguments)

    assert result.exit_code == code
    assert said in result.stderr
    assert "hint: " in result.stderr
    assert result.stdout == ""


def test_a_folder_of_safetensors_is_shown_from_its_headers(hub: StandIn) -> None:
    config = {
        "model_type": "mixtral", "num_hidden_layers": 32, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
    }  # fmt: skip
    weights = save({"model.embed_tokens.weight": np.zeros((64, 1 << 16), np.float16)})  # 8 MiB
    hub.add("org/moe", {"config.json": json.dumps(config).encode(), "model.safetensors": weights})
    remote = json.loads(run("show", "org/moe", "--json").stdout)
    assert sum(hub.bytes_sent.values()) < len(weights) // 2
    folder = run("pull", "org/moe").stdout.strip()
    local = json.loads(run("show", folder, "--json").stdout)

    for facts in (remote, local):
        assert (facts["architecture"], facts["layers"], facts["context_tokens"]) == ("mixtral", 32, 32768)
        assert (facts["experts"], facts["experts_used"]) == (8, 2)
        assert (facts["parameters"], facts["bits_per_weight"]) == (1 << 22, 16.0)
        assert facts["bytes"] == len(weights) + len(json.dumps(config))


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff\xfe", b"[" * 100_000], ids=["list", "cut", "bytes", "deep"])
def test_an_invalid_config_is_an_error(hub: StandIn, content: bytes) -> None:
    hub.add("org/bad", {"config.json": content, "model.safetensors": os.urandom(4000)})
    result = run("show", "org/bad")

    assert result.exit_code == 1
    assert re.search(r"config.json(: the file| is not JSON: it) is", result.stderr)
    assert "server" not in result.stderr


def test_the_hub_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, headrace.hub, headrace.cli.hub;"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'httpx2') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
