"""Run language models larger than your memory, at the speed of your disk; know what it costs before you start.

`load` is imported on first use, so that planning never waits for torch.
"""

from typing import TYPE_CHECKING, Any

from headrace._version import __version__
from headrace.errors import HeadraceError

if TYPE_CHECKING:
    from headrace.api import Completion, Model, Piece, load
    from headrace.plan import Plan
    from headrace.sampling_params import SamplingParams

__all__ = ["Completion", "HeadraceError", "Model", "Piece", "Plan", "SamplingParams", "__version__", "load"]

_HOMES = {
    "Completion": "headrace.api",
    "Model": "headrace.api",
    "Piece": "headrace.api",
    "load": "headrace.api",
    "SamplingParams": "headrace.sampling_params",
    "Plan": "headrace.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `headrace` has no attribute `{name}`")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
