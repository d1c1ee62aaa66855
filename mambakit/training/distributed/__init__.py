"""Training on more than one process: DDP, FSDP2 and context parallelism, launched by torchrun.

mesh            the process mesh: data shards by context shards, and what its processes exchange
context         context parallelism: the shards of one sequence, and the ops over them
sharded_scan    how a shard's tokens change a state that passes through it
"""

from __future__ import annotations

import warnings
from typing import Any

from mambakit.training.distributed.context import context_parallel, sequence_shard, shard_cu_seqlens
from mambakit.training.distributed.mesh import ProcessMesh, full, local, process_mesh

__all__ = [
    "ProcessMesh", "context_parallel", "full", "local", "process_mesh", "sequence_shard", "shard_cu_seqlens",
]  # fmt: skip
_RENAMED = {
    "Processes": "ProcessMesh", "processes": "process_mesh", "stretch": "sequence_shard",
    "stretch_of_packed": "shard_cu_seqlens",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
