"""Padding on the left of a layer's rows that changes no state (`padding.cu`), as items of a launch list."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from mambakit.ops._backends import nvrtc
from mambakit.ops._backends.launch_list import Item, Place, structure_item
from mambakit.ops._backends.structures import structure

NO_STEP = -30_000.0
"""softplus of it, with any bias, is exactly 0 in float32; float16 can hold it."""

PaddingParams = structure("PaddingParams", "pads window x delta", "rows length channels stride")
_THREADS = 256


def macros(dtype: torch.dtype, taps: int) -> dict[str, int]:
    """What `padding.cu` is compiled for."""
    bits = torch.tensor(NO_STEP, dtype=dtype, device="cpu").view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    return {"BYTES": dtype.itemsize, "TAPS": taps, "NO_STEP": int(bits) % 256**dtype.itemsize}


@functools.cache
def _module(dtype: torch.dtype, taps: int, device: int) -> nvrtc.Module:
    return nvrtc.Module(Path(__file__).parent, "padding.cu", macros(dtype, taps), device)


class PreparedPadding:
    """The launches for rows of one size.

    Args:
        stride: elements from a token of the convolution's input to the next.
        taps: k - 1. dtype: of the input, the window and the time steps.
    """

    def __init__(self, rows: int, length: int, channels: int, stride: int, taps: int, dtype: torch.dtype, device: int):
        module = _module(dtype, taps, device)
        self._window, self._steps = module.kernel("mixer_window"), module.kernel("mixer_steps")
        self._parameters = PaddingParams(rows=rows, length=length, channels=channels, stride=stride)
        self._grids = -(-rows * channels // _THREADS), -(-rows * length * channels * dtype.itemsize // 16 // _THREADS)

    def window(self, pads: Place, window: Place, x: Place) -> list[Item]:
        """Move the window (slots, channels, taps) behind the padding; row i has slot i."""
        places: dict[str, Place | None] = {"pads": pads, "window": window, "x": x, "delta": None}
        return [structure_item(self._window, self._grids[0], _THREADS, self._parameters, places)]

    def steps(self, pads: Place, delta: Place) -> list[Item]:
        """Time steps of 0 at padding, as they are before their softplus."""
        places: dict[str, Place | None] = {"pads": pads, "window": None, "x": None, "delta": delta}
        return [structure_item(self._steps, self._grids[1], _THREADS, self._parameters, places)]
