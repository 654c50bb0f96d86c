"""Imports `headrace.api` with only the needed parts of torch and transformers: 40 MiB less, and a second sooner.

transformers imports distributed tensors, flex attention, and decorators of torch's compiler. Torch itself imports the
compiler when it first computes shapes, but nothing here compiles. A stand-in therefore replaces the compiler, and its
decorators return functions unchanged. The other two are reported as not available. Only the command does this: a user's
own program may need all of them. If the slim import fails for any reason, everything is imported as usual.
"""

import gc
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from headrace.limits import check_address_space

_COMPILER = "torch._dynamo"
_DECORATORS = ("disable", "allow_in_graph", "assume_constant_result")
_REPORTED_UNAVAILABLE = ("is_torch_distributed_available", "is_torch_flex_attn_available")
# Modules of transformers that every model imports, so that they are imported while the stand-in is there.
_TRANSFORMERS_MODULES = (
    "modeling_utils",
    "masking_utils",
    "generation.utils",
    "models.auto.modeling_auto",
    "integrations.moe",
)


def import_api() -> ModuleType:
    """Import `headrace.api`, slim if transformers is not imported yet. Objects alive after it are frozen (`gc.freeze`).

    Raises the errors of `limits.check_address_space`.
    """
    check_address_space()
    if "transformers" not in sys.modules and _COMPILER not in sys.modules:
        sys.meta_path.insert(0, _FINDER)
        try:
            with _features_reported_unavailable():
                for name in _TRANSFORMERS_MODULES:
                    importlib.import_module(f"transformers.{name}")
        except Exception:  # such as another version of either: half-imported modules are removed
            _restore_compiler()
            for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
                del sys.modules[name]
    if "headrace.api" not in sys.modules:
        importlib.import_module("headrace.api")
        gc.freeze()  # a collection would look at every object of torch and transformers: 0.15 s each time
    return sys.modules["headrace.api"]


@contextmanager
def _features_reported_unavailable() -> Iterator[None]:
    from transformers import utils
    from transformers.utils import import_utils

    kept = [(module, name, getattr(module, name)) for module in (utils, import_utils) for name in _REPORTED_UNAVAILABLE]
    for module, name, _ in kept:
        setattr(module, name, lambda: False)
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def _restore_compiler() -> None:
    """Replace the stand-in by the real compiler from now on."""
    import torch

    with suppress(ValueError):
        sys.meta_path.remove(_FINDER)
    for name in [name for name in sys.modules if _is_of_compiler(name)]:
        del sys.modules[name]
    torch.__dict__.pop("_dynamo", None)


def _is_of_compiler(module: str) -> bool:
    return f"{module}.".startswith(f"{_COMPILER}.")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the compiler's modules, and loads stand-ins."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if _is_of_compiler(fullname) else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


_FINDER = _Finder()


class _StandIn(ModuleType):
    """Stand-in for the compiler, or for a submodule of it.

    The compiler's decorators do nothing. A submodule's functions import the real one when they are called. Any other
    attribute is that of the real compiler.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.__name__ != _COMPILER:
            return lambda *arguments, **options: _real(self.__name__, name)(*arguments, **options)
        return _unchanged if name in _DECORATORS else _real(_COMPILER, name)


def _unchanged(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    return (lambda other: other) if function is None else function


def _real(module: str, name: str) -> Any:
    if _FINDER in sys.meta_path:  # else a stand-in that somebody kept is used after the compiler was restored
        _restore_compiler()
    return getattr(importlib.import_module(module), name)
