"""Run a function in several connected processes (gloo, on the CPU)."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def launch(function: Callable, world: int, *args: Any, seconds: float = 120, cuda: bool = False) -> list[Any]:
    """``function(*args)`` in ``world`` processes; their results (picklable, no tensors), the first process's first.

    They are forked from a server that has imported everything once. With ``cuda`` they are started anew, since some of
    what is imported initialises CUDA, which a forked process cannot do again.
    """
    context: Any = multiprocessing.get_context("spawn" if cuda else "forkserver")
    if not cuda:
        context.set_forkserver_preload(["tests.training.preloaded"])
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=_work, args=(results, rank, world, folder, function, args)) for rank in range(world)
        ]
        for worker in workers:
            worker.start()
        found: dict[int, Any] = {}
        try:
            while len(found) < world:
                rank, value, error = results.get(timeout=seconds)
                if error:
                    raise AssertionError(f"process {rank} of {world}:\n{error}")
                found[rank] = value
        finally:
            for worker in workers:
                if len(found) < world:
                    worker.terminate()
                worker.join()
    return [found[rank] for rank in range(world)]


def _work(results: Any, rank: int, world: int, folder: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        value = function(*args)
        dist.barrier()
        results.put((rank, value, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()
