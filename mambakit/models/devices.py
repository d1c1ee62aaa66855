"""Where a model goes when nothing else is asked for: the device, and the dtype of its weights there."""

from __future__ import annotations

import torch

from mambakit.errors import UsageError


def default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> str:
    """``from_pretrained``'s dtype for a model on ``device``: "auto", the checkpoint's, on a GPU; "float32" on a CPU.

    CPUs without bfloat16 arithmetic emulate it.
    """
    return "float32" if device.type == "cpu" else "auto"


def usable_device(name: str | torch.device, what: str = "device") -> torch.device:
    """The device of this name.

    Args:
        what: the option that named it, for the error.

    Raises:
        UsageError: there is none, or it holds no numbers ("meta").
    """
    try:
        device = torch.device(name)
        torch.ones(1, dtype=torch.float32, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{what} {name}: {reason}; use one that `mambakit env` lists") from error
    return device
