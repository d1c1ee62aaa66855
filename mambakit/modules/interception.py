"""Whether a call of a module runs its class's forward and nothing else: the one test before a fast path skips the call.

A fast path (a layer's fused training pass, a decoding step as one native call, a CUDA graph, draft verification) reads
a module's weights and does not call it. That equals the call only where nothing intercepts it: no hook on the module or
on all modules, no ``forward`` of the instance (as accelerate sets), no compiled call, no patched class, no subclass, no
parametrisation (which is a subclass). Otherwise the module is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules import module as base

# Names by which an instance's own dictionary replaces its call.
_REPLACING = frozenset({"forward", "_compiled_call_impl", "_call_impl", "_slow_forward", "_conv_forward"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Packages whose forwards only compute on the device. Side effects of other forwards would happen once, at capture.
_PURE = ("torch", "mambakit", "transformers", "peft")


def hooked_globally() -> bool:
    """Whether hooks for all modules are registered."""
    return bool(
        base._global_forward_hooks or base._global_forward_pre_hooks
        or base._global_backward_hooks or base._global_backward_pre_hooks
    )  # fmt: skip


def intercepted(module: nn.Module) -> bool:
    """Whether a call of this instance does anything but its class's forward."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    # One by one, `_REPLACING`: the fastest, and what torch.compile of torch 2.9 can trace.
    if not (
        "forward" in own or "_compiled_call_impl" in own or "_call_impl" in own or "_slow_forward" in own
        or "_conv_forward" in own
    ):  # fmt: skip
        return False
    replaced = [own[name] for name in _REPLACING if own.get(name) is not None]
    # Removing a wrapper may leave the class's own method in the instance's dictionary.
    return any(getattr(f, "__func__", None) is not type(module).forward or f.__self__ is not module for f in replaced)


def patched(kind: type[nn.Module]) -> bool:
    """Whether the class's call or forward was replaced by a function of another module."""
    calls: tuple[Any, ...] = (kind.__call__, kind._call_impl)
    if any(getattr(call, "__globals__", None) is not vars(base) for call in calls):
        return True
    owner = next(c for c in kind.__mro__ if "forward" in vars(c))
    return _home(kind.forward) != owner.__module__


def untouched(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether a call of ``module`` runs the forward of one of these classes, and nothing else."""
    kind = type(module)
    return kind in kinds and not intercepted(module) and not patched(kind) and not hooked_globally()


def is_causal(conv: nn.Conv1d, padding: int) -> bool:
    """Whether output i of ``conv`` is of the k inputs that end at input i, ``padding`` zeros before the first."""
    return (
        conv.stride == (1,) and conv.dilation == (1,) and conv.padding == (padding,) and conv.padding_mode == "zeros"
    )  # fmt: skip


def is_filter(conv: Any, padding: int) -> bool:
    """Whether a call of ``conv`` is the causal convolution of each channel by its weight, and nothing else."""
    return (
        untouched(conv, nn.Conv1d) and is_causal(conv, padding) and conv.groups == conv.in_channels == conv.out_channels
    )  # fmt: skip


def is_ours(module: Any) -> bool:
    """Whether a call of ``module`` runs a forward of this package and nothing else, also of a subclass."""
    kind = type(module)
    ours = _home(kind.forward).partition(".")[0] == __name__.partition(".")[0]
    return ours and not intercepted(module) and not patched(kind) and not hooked_globally()


def any_intercepted(modules: Iterable[nn.Module]) -> bool:
    """Whether a call of any of these does more than its class's forward, or may have effects on the host."""
    if hooked_globally():
        return True
    kinds = set()
    for module in modules:
        if intercepted(module):
            return True
        kinds.add(type(module))
    return any(patched(kind) or _home(kind.forward).partition(".")[0] not in _PURE for kind in kinds)


def modules_of(module: nn.Module, found: list[nn.Module] | None = None) -> list[nn.Module]:
    """``module.modules()`` in a tenth of the time; a shared module is repeated for each of its names."""
    found = [] if found is None else found
    found.append(module)
    for child in module._modules.values():
        if child is not None:
            modules_of(child, found)
    return found


class Watch:
    """A model's modules when a step was built that skips their calls. `holds` takes microseconds."""

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = list(modules)
        self._own = [m.__dict__ for m in modules]
        self._hooks = [own[name] for own in self._own for name in _HOOKS]
        self._children = [(m._modules, list(m._modules.values())) for m in modules if m._modules]
        kinds = {type(m) for m in modules}
        self._patched = any(map(patched, kinds))
        self._calls = [(kind, kind.forward, kind.__call__, kind._call_impl) for kind in kinds]

    def holds(self) -> bool:
        """Whether no call has been intercepted since, and the modules are the same."""
        if self._patched or any(self._hooks) or hooked_globally():
            return False
        for kind, *calls in self._calls:
            if [kind.forward, kind.__call__, kind._call_impl] != calls:
                return False
        for now, children in self._children:
            if list(now.values()) != children:
                return False
        for own in self._own:
            if "forward" in own or "_compiled_call_impl" in own or "_call_impl" in own:
                return not any(map(intercepted, self.modules))
        return True


def _home(function: Any) -> str:
    """The module that a function was written in; a wrapper may copy the name of what it wraps."""
    return getattr(function, "__globals__", {}).get("__name__", "")
