"""Copies between host and device for which nobody waits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(device: torch.device, values: Tensor) -> Tensor:
    """A copy on the device, or the tensor itself where it is there. The host waits for nothing: a copy from pageable
    memory would wait for earlier launches."""
    from_host = device.type == "cuda" and not values.is_cuda
    return values.pin_memory().to(device, non_blocking=True) if from_host else values.to(device)


def integers(device: torch.device, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    """int64 on the device, as `to_device`."""
    return to_device(device, torch.tensor(values, dtype=torch.int64, device="cpu"))


def to_host(values: Tensor) -> Tensor:
    """A copy in pinned memory, which is there once the device has reached this point; of a CPU's tensor itself."""
    if not values.is_cuda:
        return values
    pinned = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(values, non_blocking=True)


class Arrival:
    """The moment at which what has been launched on the current stream so far is done, such as copies of `to_host`.

    Args:
        device: of the stream; on a CPU everything is done at once.
        sleeping: whether `wait` lets the core do other work, for a thread that is in no hurry.
    """

    def __init__(self, device: torch.device, *, sleeping: bool = False):
        self._device = device
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(blocking=sleeping)
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Wait for the device to reach it."""
        if self._event is not None:
            self._event.synchronize()

    def precede(self) -> None:
        """Have what is launched on the current stream from now on run after it; the host waits for nothing."""
        if self._event is not None:
            self._event.wait(torch.cuda.current_stream(self._device))
