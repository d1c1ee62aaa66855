"""One token through a whole model in one persistent kernel: up to 8 rows of bfloat16, float16, int8, int4 or fp8.

`persistent.cu` says how it works and `persistent_plan.py` what it is compiled with. Like the scan it is CUDA C++
compiled at run time, once for each shape of model and number of rows.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path

import torch
from torch import Tensor

from mambakit.ops._backends import nvrtc
from mambakit.ops._backends.memory import zeros
from mambakit.ops.decode.persistent_plan import MOST_ROWS, STATE_SIZE, plan_of
from mambakit.ops.decode.weights import LayerWeights, ModelWeights, check_states, tensors_of

__all__ = ["MOST_ROWS", "PARTS", "PersistentStep", "unavailable", "why_not"]

# What `PersistentStep.cycles` are of: of a layer, summed over the layers, and of the head.
PARTS = (
    "stream", "in_proj", "conv", "x_proj", "sums exchange", "dt_proj", "state", "y exchange", "out_proj", "sum", "head",
)  # fmt: skip
# What the kernel reads and writes: weights, packed ones, scales and states, tokens and sums.
_DTYPES = (
    torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
_POINTERS = (
    "layers embeddings final_norm head head_scales conv_states ssm_states tokens position history logits stream squares"
    " y sums best counter slot"
)


class Params(ctypes.Structure):
    """`Params` of persistent.cu, which explains the fields; a test compares them."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        ("eps_bits", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("choose", ctypes.c_int64),
        ("cycles", ctypes.c_void_p),
        ("mixer_eps_bits", ctypes.c_int64),
    ]


@functools.cache
def _limits(device: int) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory of a CTA)."""
    return torch.cuda.get_device_properties(device).multi_processor_count, nvrtc.shared_memory(device)


@functools.cache
def _kernel(macros: tuple[tuple[str, int], ...], device: int) -> nvrtc.Kernel:
    module = nvrtc.Module(Path(__file__).parent, "persistent.cu", dict(macros), device)
    return module.kernel("decode_step", dict(macros)["SHARED"], cooperative=True)


def unavailable(device: torch.device) -> str | None:
    """Why the kernel cannot be made for this GPU, or None when it can."""
    if torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 8:
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    return nvrtc.available()


def why_not(weights: ModelWeights, rows: int, conv_dtype: torch.dtype) -> str | None:
    """Why `PersistentStep` cannot run these weights on their device, or None when it can."""
    device = weights.final_norm.device
    if device.type != "cuda":
        return f"the weights are on {device}"
    reason = unavailable(device)
    if reason is not None:
        return reason
    plan = plan_of(weights, rows, conv_dtype, _limits(device.index))
    return plan if isinstance(plan, str) else None


class PersistentStep:
    """``step()`` reads ``tokens`` (rows,) and leaves ``logits`` (rows, v) float32; states are updated in place.

    Arguments and attributes are those of `mambakit.ops.decode.triton_many_rows.ManyRowsStep`. A row's bits do not
    depend on the other rows, nor on their number. The kernel needs all multiprocessors of the card at once: launched
    while other work runs, it waits.

    Args:
        verify: for draft verification. The rows are the next tokens of one sequence, at most 8; the step computes their
            logits, and the states after each of them. The states have one slot more than there are tokens. ``slot``
            (1,) int64 names the one with the state before the first token; the state after each token goes into the
            following slots, cyclically. To accept m tokens, add m to ``slot``, modulo the number of slots.
        warps, queue: for benchmarks, replace what `persistent_plan.plan_of` chooses: compute warps of a CTA; stages of
            a warp's ring of weight tiles, those refilled at once at the end of a phase, and cycles between the others.
        clock: for benchmarks: ``cycles`` (len(PARTS),) int32 has the time of one CTA by `PARTS`.

    Raises:
        ValueError: what it cannot serve; `why_not` tells beforehand.
    """

    def __init__(
        self,
        weights: ModelWeights,
        conv_states: Tensor,
        ssm_states: Tensor,
        capacity: int = 0,
        warps: int | None = None,
        queue: tuple[int, int, int] | None = None,
        clock: bool = False,
        verify: bool = False,
    ):
        rows, device = ssm_states.shape[1] - verify, weights.embeddings.device
        check_states(conv_states, ssm_states)
        plan = plan_of(weights, rows, conv_states.dtype, _limits(device.index), warps, queue, verify)
        if isinstance(plan, str):
            raise ValueError(f"PersistentStep: {plan}")
        macros = plan.macros | ({"CLOCK": 7 % plan.grid} if clock else {})
        h, d, v, r = macros["H"], macros["D"], macros["VOCABULARY"], macros["RANK"] + 2 * STATE_SIZE

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return zeros(*shape, dtype=dtype, device=device)

        def sentinels(*shape: int) -> Tensor:
            """Exchanged values of 2 bytes, none of which is there: all ones."""
            return buffer(*shape, dtype=torch.int16).sub_(1)

        self.tokens, self.position = buffer(rows, dtype=torch.int64), buffer(1, dtype=torch.int64)
        self.slot = buffer(1, dtype=torch.int64)
        self.history = buffer(rows, max(1, capacity), dtype=torch.int64)
        self.logits = buffer(rows, v)
        self.cycles = buffer(len(PARTS), dtype=torch.int32)
        weighted = macros["NORMS"] == 2
        fields = [_layer_fields(w, weights.final_norm.dtype, weighted) for w in weights.layers]
        table = [[self._address(t, device) for t in layer] for layer in fields]
        head, head_scales = tensors_of(weights.head)
        # Shapes are explained in persistent.cu.
        tensors = {
            "layers": torch.tensor(table, dtype=torch.int64, device=device), "embeddings": weights.embeddings,
            "final_norm": weights.final_norm, "head": head, "head_scales": head_scales, "conv_states": conv_states,
            "ssm_states": ssm_states, "tokens": self.tokens, "position": self.position, "history": self.history,
            "logits": self.logits, "stream": sentinels(4, rows, h), "squares": buffer(4, rows, 16, dtype=torch.int64),
            "y": sentinels(2, rows, d), "sums": buffer(2, 4, rows, r, dtype=torch.int64),
            "best": buffer(rows, dtype=torch.int64), "counter": buffer(64, dtype=torch.int32), "slot": self.slot,
            "cycles": self.cycles,
        }  # fmt: skip
        # The kernel has addresses only: these tensors must live as long as the step.
        self._kept = [t for layer in fields for t in layer] + list(tensors.values())
        self._params = Params(
            **{name: self._address(t, device) for name, t in tensors.items()},
            eps_bits=_bits(weights.eps), capacity=self.history.shape[1], mixer_eps_bits=_bits(weights.mixer_eps or 0.0),
        )  # fmt: skip
        self._plan, self._device = plan, device
        self._kernel = _kernel(tuple(macros.items()), device.index)

    def __call__(self, choose: bool = False) -> Tensor:
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        self._params.choose = int(choose)
        self._kernel(self._plan.grid, self._plan.threads, stream, self._params)
        return self.logits

    @staticmethod
    def _address(t: Tensor | None, device: torch.device) -> int:
        """Of a tensor whose dtype and shape `plan_of` has checked, or that was made here."""
        return nvrtc.address(t, _DTYPES, -1 if device.type == "cpu" else device.index)


def _bits(x: float) -> int:
    """Of a float32."""
    (bits,) = struct.unpack("I", struct.pack("f", x))
    return int(bits)


def _layer_fields(w: LayerWeights, dtype: torch.dtype, weighted: bool) -> list[Tensor | None]:
    """A layer's tensors in the order of the enum in persistent.cu; ``weighted``: with the weights of dt's, B's and C's
    norms."""
    # x_proj is small, and read by columns: a packed one is widened once.
    x_proj = w.x_proj if isinstance(w.x_proj, Tensor) else w.x_proj.dequantized().to(dtype).contiguous()
    return [
        w.norm, *tensors_of(w.in_proj), w.in_proj_bias, w.conv, w.conv_bias, x_proj, w.dt_proj, w.dt_bias, w.A_log, w.D,
        *tensors_of(w.out_proj), w.out_proj_bias, *(w.norms() if weighted else ()),
    ]  # fmt: skip
