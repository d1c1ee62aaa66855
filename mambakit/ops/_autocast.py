"""Autocast on any device: on meta there is none, and torch raises when it is asked."""

from __future__ import annotations

import contextlib

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on ``device``; None where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Computation on ``device`` in the dtypes that the code names."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
