"""CUDA graphs: the only module that captures them."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, Literal, TypeVar

import torch

T = TypeVar("T")

# A capture fails where another thread waits for the device, or allocates, meanwhile.
_capturing = threading.RLock()


def between_captures() -> contextlib.AbstractContextManager[object]:
    """In here no other thread captures a graph: for a thread that waits for the device beside the one that captures."""
    return _capturing


class CapturedGraph(Generic[T]):
    """GPU work that is captured once and repeated by `replay`.

    Args:
        run: the function to capture. What it returns is allocated in the graph's memory. It must not wait for the
            device.
        device: of the work; it need not be the current device.
        warm_ups: the number of calls of ``run`` before the capture, on a side stream, which compile its kernels.
        shared: another graph whose memory pool this one uses, too. Only one of the two may run at a time.
        stream: to capture on; default: a new one.
        error_mode: `torch.cuda.graph`'s ``capture_error_mode``.

    Attributes:
        result: what ``run`` returned; valid after a replay, until the next replay of a graph that shares the pool.
    """

    def __init__(
        self,
        run: Callable[[], T],
        device: torch.device,
        *,
        warm_ups: int = 0,
        shared: CapturedGraph[Any] | None = None,
        stream: torch.cuda.Stream | None = None,
        error_mode: Literal["global", "thread_local", "relaxed"] = "global",
    ):
        with torch.cuda.device(device):
            if warm_ups:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(warm_ups):
                        run()
                torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            pool = None if shared is None else shared._graph.pool()
            with (
                _capturing,
                _without_garbage_collection(),
                torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode=error_mode),
            ):
                self.result = run()

    def replay(self) -> None:
        """Launch the captured work on the current stream; does not wait for it."""
        self._graph.replay()


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Another graph that the collector frees during a capture would make the capture fail."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
