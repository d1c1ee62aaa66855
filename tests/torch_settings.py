"""torch's settings that a user may have changed, and that change no number of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

SETTINGS = ("float16", "bfloat16", "float64", "meta", "filled")


@contextlib.contextmanager
def setting(name: str) -> Iterator[None]:
    """A default dtype, the default device "meta", or uninitialised memory filled with NaN."""
    if name == "meta":
        with torch.device("meta"):
            yield
    elif name == "filled":
        torch.use_deterministic_algorithms(True)
        assert torch.utils.deterministic.fill_uninitialized_memory
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, name))
        try:
            yield
        finally:
            torch.set_default_dtype(before)
