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


def worst(actual: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the expected tensor's largest value."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
