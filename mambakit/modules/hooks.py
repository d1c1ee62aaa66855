"""Whether somebody listens to a module's calls: a path that does not call the module would pass by them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as base


def hooked_globally() -> bool:
    """Whether there are hooks on the calls of every module."""
    return bool(
        base._global_forward_hooks or base._global_forward_pre_hooks
        or base._global_backward_hooks or base._global_backward_pre_hooks
    )  # fmt: skip


def hooked(module: nn.Module) -> bool:
    """Whether there are hooks on this module's own calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
