"""The library with as little of torch and transformers as a run needs: 40 MiB less, and a second sooner.

transformers imports its tensors over several machines, flex attention, and marks for torch's compiler, and torch itself asks
for the compiler when it first computes shapes; nothing here compiles. So the compiler is a stand-in whose marks leave
functions as they are, and the other two are said to be absent. Only the command does this: in a program of its own, a
user may want all of them. Whatever goes wrong with the imports, everything is imported as usual.
"""

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
_MARKS = ("disable", "allow_in_graph", "assume_constant_result")  # decorators of functions
_ABSENT = ("is_torch_distributed_available", "is_torch_flex_attn_available")
# Of transformers what every model's own module imports, so that this is done while the stand-in is there.
_MODULES = ("modeling_utils", "masking_utils", "generation.utils", "models.auto.modeling_auto", "integrations.moe")


def library() -> ModuleType:
    """`headrace.api`, imported in this way if transformers is not there yet. Raises what `limits.check_address_space` does."""
    check_address_space()
    if "transformers" not in sys.modules and _COMPILER not in sys.modules:
        sys.meta_path.insert(0, _FINDER)
        try:
            with _absent():
                for name in _MODULES:
                    importlib.import_module(f"transformers.{name}")
        except Exception:  # another version of either, say: what was half imported is forgotten
            _give_way()
            for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
                del sys.modules[name]
    return importlib.import_module("headrace.api")


@contextmanager
def _absent() -> Iterator[None]:
    from transformers import utils
    from transformers.utils import import_utils

    kept = [(module, name, getattr(module, name)) for module in (utils, import_utils) for name in _ABSENT]
    for module, name, _ in kept:
        setattr(module, name, lambda: False)
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def _give_way() -> None:
    """From now on the compiler is the real one."""
    import torch

    with suppress(ValueError):
        sys.meta_path.remove(_FINDER)
    for name in [name for name in sys.modules if _is_of_compiler(name)]:
        del sys.modules[name]
    torch.__dict__.pop("_dynamo", None)


def _is_of_compiler(module: str) -> bool:
    return f"{module}.".startswith(f"{_COMPILER}.")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the compiler's modules, and gives stand-ins."""

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
    """The compiler, or a part of it. Its marks do nothing; what a part has is the real thing, once it is called; and
    whoever asks for anything else gets the real compiler.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.__name__ != _COMPILER:
            return lambda *arguments, **options: _real(self.__name__, name)(*arguments, **options)
        return _mark if name in _MARKS else _real(_COMPILER, name)


def _mark(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    return (lambda other: other) if function is None else function


def _real(module: str, name: str) -> Any:
    _give_way()
    return getattr(importlib.import_module(module), name)
