"""Where releases of torch differ in what ops and modules use of them; nothing else asks for torch's version.

The oldest release is that of `mambakit._versions.TESTED`. A branch here names the first release that needs no branch.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Callable
from typing import Any

import torch


def release_of(version: str) -> tuple[int, int]:
    """(major, minor) of a version such as "2.13.0+cpu".

    Raises:
        ValueError: it does not begin with two numbers.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"torch.__version__ is {version!r}, which does not begin with two numbers")
    return int(found[1]), int(found[2])


RELEASE = release_of(torch.__version__)


def _bits(keys: Any) -> int:
    return keys.raw_repr()


def _bits_by_name(keys: Any) -> int:
    """2.4 gives a set's members as text alone."""
    names = repr(keys)[len("DispatchKeySet(") : -1].split(", ")
    return sum(1 << _numbers.setdefault(name, len(_numbers)) for name in names)


_numbers: dict[str, int] = {}

# An int with a bit for each dispatch key of a DispatchKeySet.
dispatch_bits: Callable[[Any], int] = _bits if RELEASE >= (2, 5) else _bits_by_name


def _never_exporting() -> bool:
    """Before 2.7 torch does not say so: an exported program then keeps the scan's checkpoints, which costs memory."""
    return False


def _exporting() -> bool:
    """`torch.compiler.is_exporting`, which torch.compile takes for True in every graph before torch 2.13."""
    return torch.compiler._is_exporting_flag


# Whether torch.export traces this call.
is_exporting: Callable[[], bool] = _exporting if RELEASE >= (2, 7) else _never_exporting


@functools.cache
def bound_messages() -> None:
    """For a trace of an op with several results. Before 2.13 inductor writes out the arguments of each op that it sees
    for the first time, with all that they were computed from, for a log that nobody may read. Two results of a layer
    are the arguments of the next, so n layers are 2^n copies of the first: a model of 24 layers was never compiled."""
    if RELEASE < (2, 13):
        from torch._inductor.exc import OperatorIssue

        OperatorIssue.operator_str = staticmethod(_named)  # type: ignore[method-assign]


def _named(target: Any, args: Any, kwargs: Any) -> str:
    """The op, and what its arguments are."""
    kinds = [type(a).__name__ for a in args] + [f"{name}={type(a).__name__}" for name, a in kwargs.items()]
    return f"  target: {target}\n  args: {', '.join(kinds)}"


def outside_graphs(function: Callable, reason: str) -> Callable:
    """``function`` as a break of the graph where torch.compile meets it; ``reason`` is shown by 2.8 and newer.

    It imports torch._dynamo, which takes a second: call it in a module that only a trace imports.
    """
    if RELEASE >= (2, 8):
        return torch.compiler.disable(function, reason=reason)
    return torch.compiler.disable(function)


def count_flops(op: Any, formula: Callable[..., int]) -> None:
    """torch's FlopCounterMode counts calls of ``op`` by ``formula`` of its arguments, shapes in the place of tensors.

    The formula is registered when torch's module is imported: it imports Triton, a third of a second that a process
    which counts nothing need not wait.
    """
    if _COUNTER in sys.modules:
        _register(op, formula)
    else:
        sys.meta_path.insert(0, _AfterImport(lambda: _register(op, formula)))


_COUNTER = "torch.utils.flop_counter"


def _register(op: Any, formula: Callable[..., int]) -> None:
    """2.4 registers a formula for the overload and looks for it by the packet of overloads."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    register_flop_formula(op)(formula)
    if RELEASE < (2, 5):
        flop_registry[op] = flop_registry.pop(op.default)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls ``action`` once, when `_COUNTER` has been imported."""

    def __init__(self, action: Callable[[], None]):
        self.action = action

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == _COUNTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action()

        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010, which mypy takes for a method's
        return spec
