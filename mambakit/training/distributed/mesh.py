"""The process mesh of a training run, on PyTorch's own DDP and FSDP2.

Every process reads the same batch and takes its shard of it, so the order of the data does not depend on the number of
processes. Gradients are means over processes; a process's loss is scaled so that the mean is the gradient of the batch.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from mambakit.modules import MambaBlock
from mambakit.training.distributed.context import context_parallel, sequence_shard

# The first process may tokenise, export or write a checkpoint for longer than NCCL's own ten minutes.
_TIMEOUT = datetime.timedelta(hours=2)
_DDP: dict[str, Any] = {"gradient_as_bucket_view": True, "bucket_cap_mb": 100}
# Blocks in one FSDP unit: more mean fewer all-gathers, and more memory.
_BLOCKS_PER_UNIT = 4
_LAUNCH = "torchrun --nproc-per-node {count} -m mambakit train ..."


class ProcessMesh:
    """A mesh of `data_size` by `context_size` processes: rows of a batch are sharded along the first dimension, the
    tokens of each row along the second.

    Attributes:
        mode: "none" (one process), "ddp" (every process holds the model) or "fsdp" (each holds a shard of it).
        rank, world: this process's number and how many there are.
        device: this process's.
        data_rank, data_size: which shard of a batch's rows is this process's.
        context_rank, context_size: which shard of a row is this process's.
    """

    def __init__(self, mode: str, device: torch.device, context_size: int = 1):
        self.mode, self.device, self.context_size = mode, device, context_size
        self.rank, self.world = (0, 1) if mode == "none" else (dist.get_rank(), dist.get_world_size())
        if self.world % context_size:
            raise ValueError(f"{self.world} processes do not divide into groups of context_parallel={context_size}")
        self.data_size = self.world // context_size
        self.data_rank, self.context_rank = divmod(self.rank, context_size)
        self._skeleton: nn.Module | None = None
        # The stream on which steps are captured. DDP keeps its gradient accumulators on the stream that it is made on.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Called before the process group is destroyed: captured graphs hold its collectives.
        self.before_closing: list[Callable[[], None]] = []
        if mode != "none":
            grid = init_device_mesh(device.type, (self.data_size, context_size), mesh_dim_names=("data", "context"))
            self._data, self._context = grid["data"].get_group(), grid["context"].get_group()

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def capturable(self) -> bool:
        """Whether a step, its collectives included, can be captured in a CUDA graph: where no row is sharded."""
        return self.mode == "none" or (self.device.type == "cuda" and self.context_size == 1)

    def require_even(self, rows: int, what: str) -> None:
        if rows % self.data_size:
            raise ValueError(
                f"{what} is {rows}, which {self.data_size} processes cannot divide evenly; make it a multiple of "
                f"{self.data_size}"
            )

    def parallelize(
        self, objective: nn.Module, model: nn.Module, *, reduce_dtype: torch.dtype = torch.float32,
        reshard_after_forward: bool = True,
    ) -> nn.Module:  # fmt: skip
        """The module to call in place of ``objective``, whose forward is the loss of ``model``, its submodule.

        Call this before the optimiser is made: FSDP replaces the model's parameters by shards.

        Args:
            reduce_dtype: of the exchanged gradients, float32 or bfloat16; gradients are float32 before and after.
            reshard_after_forward: FSDP's, see `TrainConfig`. Parameters are gathered in float32: FSDP casts a unit's
                parameters all alike, and A_log, D and the norms lose too much in bfloat16.
        """
        if self.first and (self.mode == "fsdp" or self.context_size > 1):
            self._skeleton = _empty_copy(model)
        if self.context_size > 1:
            context_parallel(model, self._context)
        if self.mode == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            if self.stream is None:
                wrapped = DistributedDataParallel(objective, **_DDP)
            else:
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    wrapped = DistributedDataParallel(objective, device_ids=[self.device], **_DDP)
                torch.cuda.current_stream().wait_stream(self.stream)
            if reduce_dtype == torch.bfloat16:
                wrapped.register_comm_hook(None, _reduce_in_bfloat16)
            return wrapped
        if self.mode == "fsdp":
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            mesh = init_device_mesh(self.device.type, (self.world,))
            blocks: list[nn.Module] = [block for block in model.modules() if isinstance(block, MambaBlock)]
            policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
            options: dict[str, Any] = {
                "mesh": mesh,
                "mp_policy": policy,
                "reshard_after_forward": reshard_after_forward,
            }
            for i in range(0, len(blocks), _BLOCKS_PER_UNIT):
                fully_shard(blocks[i : i + _BLOCKS_PER_UNIT], **options)
            fully_shard(objective, **options)
        return objective

    @contextlib.contextmanager
    def accumulating(self, objective: nn.Module, last: bool) -> Iterator[None]:
        """A context for forward and backward of one micro-batch: DDP reduces gradients in the last one only."""
        local = self.mode == "ddp" and not last
        with objective.no_sync() if local else contextlib.nullcontext():  # type: ignore[operator]
            yield

    def whole_state(self, model: nn.Module) -> dict[str, Any]:
        """The unsharded tensors of a model; with FSDP they are at the first process alone. A collective call."""
        if self.mode != "fsdp":
            return model.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def whole(self, model: nn.Module) -> nn.Module | None:
        """The unsharded model for one process at the first process, None at the others. A collective call."""
        state = self.whole_state(model)
        if not self.first:
            return None
        if self._skeleton is None:
            return model
        self._skeleton.load_state_dict(state)
        return self._skeleton.to(self.device)

    # -- shards of a batch -----------------------------------------------------------------------------------------

    def rows(self, x: Tensor, fill: Any = 0) -> Tensor:
        """This process's shard of the rows of ``x`` (b, ...): (ceil(b / data_size), ...), padded with ``fill``."""
        each = -(-x.shape[0] // self.data_size)
        part = x[self.data_rank * each : (self.data_rank + 1) * each]
        if part.shape[0] == each:
            return part
        return torch.cat([part, x.new_full((each - part.shape[0], *x.shape[1:]), fill)])

    def sequence_shard(self, length: int) -> slice:
        """This process's shard of a row of ``length`` tokens."""
        return sequence_shard(length, self.context_rank, self.context_size)

    # -- agreement -------------------------------------------------------------------------------------------------

    def mean(self, x: Tensor) -> Tensor:
        """The mean of ``x`` over processes."""
        if self.world > 1:
            x = x.clone()
            dist.all_reduce(x)
            x /= self.world
        return x

    def agree(self, value: float) -> float:
        """The first process's value, so that what depends on a clock is the same everywhere."""
        if self.world == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(box, 0)
        return box.item()

    def gather_rows(self, x: Tensor, dim: int) -> Tensor:
        """The rows of all data shards along ``dim``, in order."""
        if self.data_size == 1:
            return x
        x = x.movedim(dim, 0).contiguous()
        gathered = [torch.empty_like(x) for _ in range(self.data_size)]
        dist.all_gather(gathered, x, group=self._data)
        return torch.cat(gathered).movedim(0, dim)

    def share(self, value: Any) -> Any:
        """The first process's value, any picklable one, at every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def _reduce_in_bfloat16(_, bucket):  # DDP reads annotations, and refuses them as text
    """DDP's hook: the mean of a bucket of gradients over processes, exchanged in bfloat16. PyTorch's own such hook is
    refused without NCCL."""
    gradients = bucket.buffer()
    half = gradients.to(torch.bfloat16).div_(dist.get_world_size())

    def widen(reduced: torch.futures.Future) -> Tensor:
        return gradients.copy_(reduced.value()[0])

    return dist.all_reduce(half, async_op=True).get_future().then(widen)


def _empty_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU with uninitialised parameters, tied where the model's are."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(t): torch.empty_like(t, device="cpu") for t in tensors}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(memo[id(p)], requires_grad=p.requires_grad)
    return copy.deepcopy(model, memo)


def full(x: Tensor) -> Tensor:
    """A sharded tensor's whole value; any other tensor itself."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


@contextlib.contextmanager
def process_mesh(mode: str, context_size: int = 1) -> Iterator[ProcessMesh]:
    """The mesh of the processes that torchrun started; its process group is destroyed at the end.

    Args:
        mode: "none", "ddp" or "fsdp".
        context_size: processes over which one sequence is sharded.

    Raises:
        ValueError: ``mode`` does not fit how this process was launched.
    """
    launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    world = int(os.environ["WORLD_SIZE"]) if launched else 1
    cuda = torch.cuda.is_available()
    if mode == "none":
        if world > 1:
            raise ValueError(
                f'{world} processes were launched, but parallel is "none"; set parallel=ddp or parallel=fsdp'
            )
        yield ProcessMesh("none", torch.device("cuda" if cuda else "cpu"))
        return
    if not launched and not dist.is_initialized():
        raise ValueError(f"parallel is {mode!r} but one process was started; launch it with {_LAUNCH.format(count=2)}")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; launch "
            f"{_LAUNCH.format(count=torch.cuda.device_count())}"
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:  # gloo as well: checkpoints exchange CPU objects
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TIMEOUT)
    mesh = ProcessMesh(mode, device, context_size)
    try:
        yield mesh
    finally:
        for close in mesh.before_closing:
            close()
        if ours:
            dist.destroy_process_group()
