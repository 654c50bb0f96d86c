"""Run language models larger than your memory, at the speed of your disk; know what it costs before you start.

`load` is imported on first use, so that planning never waits for torch.
"""

from typing import TYPE_CHECKING, Any

from headrace._version import __version__
from headrace.errors import HeadraceError

if TYPE_CHECKING:
    from headrace.api import Model, load
    from headrace.async_llm import AsyncLLM
    from headrace.completion import Completion
    from headrace.engine.request import Request, RequestOutput
    from headrace.plan import Plan
    from headrace.sampling_params import SamplingParams

__all__ = [
    "AsyncLLM",
    "Completion",
    "HeadraceError",
    "Model",
    "Plan",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "load",
]

_HOMES = {
    "AsyncLLM": "headrace.async_llm",
    "Completion": "headrace.completion",
    "Model": "headrace.api",
    "Request": "headrace.engine.request",
    "RequestOutput": "headrace.engine.request",
    "load": "headrace.api",
    "SamplingParams": "headrace.sampling_params",
    "Plan": "headrace.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `headrace` has no attribute `{name}`")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
