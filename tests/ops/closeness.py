"""How far a result is from what is expected."""

from __future__ import annotations

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, 0 for two empty or zero tensors; NaN never passes a comparison."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    scale = expected.norm().item()
    error = (actual - expected).norm().item()
    return error if scale == 0 else error / scale
