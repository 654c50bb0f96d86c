"""The command's slim import leaves modules out, changes nothing else, and gives way to the real compiler."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.zoo

ANSWER = """
import json, sys
import headrace
with headrace.load(sys.argv[1], memory="4GiB", context_tokens=64, draft="none") as model:
    text = model.generate("hello", max_tokens=8, raw=True, sampling=headrace.SamplingParams(temperature=0)).text
from headrace.process import peak_bytes
loaded = [name for name in ("torch._inductor", "torch.distributed.tensor") if name in sys.modules]
print(json.dumps({"text": text, "loaded": loaded, "peak": peak_bytes()}))
"""
SLIM = "from headrace import slim_import; slim_import.import_api()"
BREAK = """
from headrace import slim_import
slim_import._TRANSFORMERS_MODULES = (*slim_import._TRANSFORMERS_MODULES, "no_such_module")
slim_import.import_api()
"""


def answer(before: str, model: Path) -> dict[str, object]:
    command = [sys.executable, "-c", before + "\n" + ANSWER, str(model)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def test_the_answer_is_the_same_and_takes_less_memory(tiny_llama: Path) -> None:
    usual, slim = answer("", tiny_llama), answer(SLIM, tiny_llama)
    assert slim["text"] == usual["text"]
    assert slim["loaded"] == []
    assert usual["loaded"]
    assert slim["peak"] < usual["peak"] - (20 << 20)  # type: ignore[operator]


def test_a_slim_import_that_fails_falls_back_to_the_usual_one(tiny_llama: Path) -> None:
    assert answer(BREAK, tiny_llama)["text"] == answer("", tiny_llama)["text"]


@pytest.mark.parametrize(
    "used",
    [
        "from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex as made; made()",
        "import torch; assert torch._dynamo.eval_frame.OptimizedModule",
    ],
)
def test_the_real_compiler_replaces_the_stand_in_when_it_is_used(used: str) -> None:
    code = f"""{SLIM}
{used}
import torch, torch._dynamo
assert torch._dynamo.__file__.endswith("__init__.py")
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_stand_in_that_somebody_kept_does_not_import_the_compiler_again() -> None:
    code = f"""{SLIM}
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex as kept
kept()
import torch._dynamo as first
kept()
import torch._dynamo as second
assert first is second
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_torch_that_is_there_already_is_left_alone() -> None:
    code = f"import torch, torch._dynamo as before\n{SLIM}\nimport torch\nassert torch._dynamo is before"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
