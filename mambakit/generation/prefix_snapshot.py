"""One snapshot of a prefix cache: the state after some tokens and, where they are known, the logits after them."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.decoding.transfers import Arrival, to_host
from mambakit.ops._backends.captured_graph import between_captures

LOGITS = "logits"  # their name beside those of the states, which end in "_states"


class Snapshot:
    """Tensors that never change; `to_host` replaces them by equal ones elsewhere.

    Args:
        tensors: by `Stack.key`, of one row, and (1, v) by `LOGITS` where they are known. The work that writes them has
            been launched on the current stream.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self._held = tensors, Arrival(_device_of(tensors))
        self.nbytes = bytes_of(tensors)
        self.has_logits = LOGITS in tensors

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, to be read on the current stream."""
        tensors, written = self._held
        written.precede()
        for tensor in tensors.values():
            if tensor.is_cuda:  # it may be dropped before the stream has read it
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensors

    def on_host(self) -> dict[str, Tensor]:
        """The tensors where they are on the host, else copies, for which this waits: they are made on a stream beside
        the GPU's other work, into pageable memory."""
        tensors, written = self._held  # not freed before the copy has ended
        device = _device_of(tensors)
        if device.type != "cuda":
            return tensors
        with between_captures(), torch.cuda.stream(torch.cuda.Stream(device)):
            written.precede()
            pinned = {name: to_host(tensor) for name, tensor in tensors.items()}
            Arrival(device, sleeping=True).wait()
            return {name: tensor.clone() for name, tensor in pinned.items()}  # pinned memory is used again at once

    def to_host(self) -> None:
        """Replace the tensors by those `on_host`."""
        with between_captures():  # the old ones are dropped in here, too
            self._held = self.on_host(), Arrival(torch.device("cpu"))


def bytes_of(tensors: dict[str, Tensor]) -> int:
    """Bytes of these tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def on_gpu(tensors: dict[str, Tensor]) -> bool:
    """Whether these are plain tensors on one GPU."""
    return _device_of(tensors).type == "cuda" and all(type(tensor) is Tensor for tensor in tensors.values())


def _device_of(tensors: dict[str, Tensor]) -> torch.device:
    return next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
