"""More than one process in training: DDP, FSDP2 and context parallelism, launched by torchrun."""

from mambakit.training.distributed.context import context_parallel, stretch, stretch_of_packed
from mambakit.training.distributed.processes import Processes, full, local, processes

__all__ = ["Processes", "context_parallel", "full", "local", "processes", "stretch", "stretch_of_packed"]
