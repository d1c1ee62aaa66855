"""One token through a whole model on a CPU: a program of kernel calls, recorded once and run by one call into C.

Between the kernels of a step there is no Python, no dispatcher and no allocation: at batch 1 those would cost more than
reading a quantised model. Activations are float32 whatever the weights are, so half weights cost nothing in precision.
"""

from __future__ import annotations

import ctypes
import itertools
import operator
import weakref
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mambakit.ops._backends import native
from mambakit.ops._backends.memory import all_plain, zeros
from mambakit.ops._backends.structures import (
    FLOAT32,
    FLOAT32_OR_BFLOAT16,
    address,
    address_of_rows,
    as_float32,
    check,
    is_half,
)
from mambakit.ops.causal_conv1d import cpu as conv
from mambakit.ops.decode.packed import PackedLayer, PackedModel
from mambakit.ops.linear import cpu as matvec
from mambakit.ops.linear.cpu import MOST_ROWS
from mambakit.ops.linear.packed import PackedWeight
from mambakit.ops.rms_norm import cpu as norm
from mambakit.ops.selection_norm import cpu as selection_norm
from mambakit.ops.selective_scan import cpu as scan


def buffer(*shape: int) -> Tensor:
    """Activations are float32 on the CPU."""
    return zeros(*shape, dtype=torch.float32)


class _Call(ctypes.Structure):
    _fields_ = [("kernel", ctypes.c_void_p), ("arguments", ctypes.c_void_p), ("variant", ctypes.c_int64)]


@dataclass
class _Program:
    calls: list[_Call] = field(default_factory=list)
    held: list[object] = field(default_factory=list)  # tensors and structures that the calls point to

    def hold(self, tensor: Tensor | None) -> Tensor | None:
        self.held.append(tensor)
        return tensor

    def add(self, kernel: str, arguments: ctypes.Structure, variant: int) -> None:
        self.calls.append(_Call(native.kernel_address(kernel), ctypes.addressof(arguments), variant))
        self.held.append(arguments)


class Prepared(Protocol):
    """What `prepared` runs."""

    _states: tuple[Tensor, Tensor]

    def run(self, x: Tensor) -> Tensor: ...


_handles = itertools.count(1)
_steps: weakref.WeakValueDictionary[int, Prepared] = weakref.WeakValueDictionary()


def handle_of(step: Prepared) -> int:
    """A handle, by which `prepared` finds the step as long as it is there."""
    handle = next(_handles)
    _steps[handle] = step
    return handle


class DecodeStep:
    """``step(x) -> logits``: (b, h) embeddings of the next tokens in, (b, v) float32 logits out, states updated in
    place.

    A call goes through the dispatcher as `mambakit::decode.prepared`, which finds this object by its handle.

    Args:
        layers: the weights of every layer, in order.
        final_norm: (h,) float32.
        head: the output head (v, h).
        eps: of the norms of the residual stream.
        conv_states, ssm_states: (layers, b, d, k - 1) float32 or bfloat16 and (layers, b, d, n) float32, contiguous:
            read and written in place, so a cache's own tensors. They must not be moved while the step is in use.
        mixer_eps: of the norms of dt, B and C (`mambakit.ops.selection_norm`); None: there are none.
        threads: of a step; None: torch's number when it is made.
        logits: where `compute` writes them, (b, v) float32; None: a buffer of its own.

    The large weights are read where they are. Serves b from 1 to 16; `mambakit.ops.decode.cpu_parts` has any number.

    Raises:
        ValueError: states that the kernels cannot use in place, or a batch outside 1 to 16.
        TypeError: weights or states that are not plain memory on the CPU.
    """

    def __init__(
        self,
        layers: list[PackedLayer],
        final_norm: Tensor,
        head: PackedWeight,
        eps: float,
        conv_states: Tensor,
        ssm_states: Tensor,
        mixer_eps: float | None = None,
        threads: int | None = None,
        logits: Tensor | None = None,
    ):
        b = ssm_states.shape[1]
        if not 1 <= b <= MOST_ROWS:
            raise ValueError(f"DecodeStep: the batch is {b}; it serves 1 to {MOST_ROWS}, use the model itself beyond")
        if conv_states.dtype not in (torch.float32, torch.bfloat16) or ssm_states.dtype != torch.float32:
            raise ValueError(
                f"DecodeStep: states are {conv_states.dtype} and {ssm_states.dtype}; they must be float32 or bfloat16, "
                "and float32"
            )
        if not (conv_states[0].is_contiguous() and ssm_states[0].is_contiguous()):  # of a layer; layers may be apart
            raise ValueError("DecodeStep: states must be contiguous to be updated in place; pass a cache's own tensors")
        self._program = program = _Program()
        self._threads = native.threads() if threads is None else threads
        self._b = b
        h, d = final_norm.shape[0], ssm_states.shape[2]
        r, n = layers[0].dt_proj.in_features, ssm_states.shape[3]
        # Every layer uses the same buffers: they stay in cache.
        self._x, self._residual, normed = (buffer(b, h) for _ in range(3))
        xz, p = buffer(b, 2 * d), buffer(b, r + 2 * n)
        u, delta, y = (buffer(b, d) for _ in range(3))
        self.logits = buffer(b, head.out_features) if logits is None else logits
        program.held += [conv_states, ssm_states, layers, head, normed, xz, p, u, delta, y]
        for i, w in enumerate(layers):
            self._norm(w.norm, eps, normed)
            self._linear(normed, w.in_proj, w.in_proj_bias, xz)
            self._conv(xz[:, :d], w, conv_states[i], u)
            self._linear(u, w.x_proj, None, p)
            self._selection_norm(p, w, mixer_eps)
            self._linear(p[:, :r], w.dt_proj, None, delta)
            self._scan(u, delta, p[:, r:], xz[:, d:], w, ssm_states[i], y)
            self._linear(y, w.out_proj, w.out_proj_bias, self._x)
        self._norm(final_norm, eps, normed)
        self._linear(normed, head, None, self.logits)
        self._states = conv_states, ssm_states
        self.handle = handle_of(self)
        self._calls = (_Call * len(program.calls))(*program.calls)
        self._run = native.runner()
        self._count, self._team = ctypes.c_int64(len(program.calls)), ctypes.c_int64(self._threads)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mambakit.decode.prepared(x, *self._states, self.handle, self.logits.shape[1])

    def run(self, x: Tensor) -> Tensor:
        """The step itself, below the dispatcher."""
        self.load(x)
        self.compute()
        return self.logits.clone()  # the buffer is the next step's

    def load(self, x: Tensor) -> None:
        """The embeddings that `compute` reads."""
        self._x.copy_(x)
        self._residual.zero_()

    def compute(self) -> None:
        """From `load` to ``logits`` and the states, without torch: any thread may call it."""
        check(self._run(self._calls, self._count, self._team))

    def _norm(self, weight: Tensor, eps: float, y: Tensor) -> None:
        """The residual stream takes up x, in place, and y is its norm."""
        x, residual = self._x, self._residual
        b, h = x.shape
        scale = self._program.hold(as_float32(weight))
        stream = address(residual, FLOAT32, b * h)
        arguments = norm.Arguments(
            address(x, FLOAT32, b * h), address(scale, FLOAT32, h), stream, address(y, FLOAT32, b * h), stream,
            b, h, 0, 0, 0, 0, self._threads, x.stride(0), x.stride(0), eps,
        )  # fmt: skip
        self._program.add("rms_norm", arguments, 0)

    def _linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None, y: Tensor) -> None:
        bias = self._program.hold(as_float32(bias))
        self._program.add("linear", matvec.arguments(x, weight, bias, y), matvec.KINDS[weight.format])

    def _selection_norm(self, p: Tensor, w: PackedLayer, eps: float | None) -> None:
        """dt, B and C are normalised in place, in the models that do."""
        if eps is None:
            return
        weights = tuple(self._program.hold(as_float32(t)) for t in w.norms())
        rank = w.dt_proj.in_features
        self._program.add("selection_norm", selection_norm.in_place(p, rank, eps, weights), 0)

    def _conv(self, x: Tensor, w: PackedLayer, state: Tensor, u: Tensor) -> None:
        weight, bias = self._program.hold(as_float32(w.conv)), self._program.hold(as_float32(w.conv_bias))
        (b, d), k = u.shape, w.conv.shape[1]
        window = address(state, FLOAT32_OR_BFLOAT16, b * d * (k - 1))
        arguments = conv.Arguments(
            address_of_rows(x, FLOAT32, (b, d)), address(weight, FLOAT32, d * k), address(bias, FLOAT32, d), window,
            None, None, window, address(u, FLOAT32, b * d),
            b, 1, d, k, b, 1, is_half(state), self._threads, x.stride(0), 0,
        )  # fmt: skip
        self._program.add("causal_conv1d", arguments, 0)

    def _scan(self, u: Tensor, delta: Tensor, BC: Tensor, z: Tensor, w: PackedLayer, state: Tensor, y: Tensor) -> None:
        A, D, bias = (self._program.hold(as_float32(t)) for t in (w.A, w.D, w.dt_bias))
        b, d = u.shape
        n = state.shape[2]
        held = address(state, FLOAT32, b * d * n)
        arguments = scan.Arguments(
            address(u, FLOAT32, b * d), address(delta, FLOAT32, b * d), address(A, FLOAT32, d * n),
            address_of_rows(BC[:, :n], FLOAT32, (b, n)), address_of_rows(BC[:, n:], FLOAT32, (b, n)),
            address(D, FLOAT32, d), address_of_rows(z, FLOAT32, (b, d)), address(bias, FLOAT32, d),
            held, None, None, held, None, address(y, FLOAT32, b * d),
            b, 1, d, n, b, 0, 1, self._threads,
            u.stride(0), 0, delta.stride(0), 0, z.stride(0), 0, BC.stride(0), 0, BC.stride(0), 0,
        )  # fmt: skip
        self._program.add("selective_scan", arguments, 0)


def prepared(x: Tensor, conv_states: Tensor, ssm_states: Tensor, step: int, vocabulary: int) -> Tensor:
    """`mambakit::decode.prepared`: the `DecodeStep` of the handle ``step``, on the states that it was made for."""
    found = _steps.get(step)
    if found is None:
        raise RuntimeError(f"decode: there is no prepared step {step}; keep its DecodeStep as long as it is called")
    if any(
        given.data_ptr() != own.data_ptr() for given, own in zip((conv_states, ssm_states), found._states, strict=True)
    ):
        raise RuntimeError("decode: the states are not those that the step was made for; make a DecodeStep of these")
    return found.run(x)


def serves(x, conv_states, ssm_states, weights, formats, groups, eps, mixer_eps) -> bool:
    """What `DecodeStep` reads in place: it would copy small weights of another dtype, and not see them change."""
    if not 1 <= x.shape[0] <= MOST_ROWS or x.shape[0] != ssm_states.shape[1]:
        return False
    found = _recorded.get(ssm_states)
    if found is not None and found.fits(
        conv_states, ssm_states, weights, (list(formats), list(groups), eps, mixer_eps)
    ):
        return True
    if conv_states.dtype not in FLOAT32_OR_BFLOAT16 or ssm_states.dtype != torch.float32:
        return False
    if not (conv_states.is_contiguous() and ssm_states.is_contiguous() and all_plain(weights)):
        return False
    if not set(formats) <= matvec.KINDS.keys():
        return False
    model = PackedModel.from_flat(weights, formats, groups, eps, mixer_eps)
    small = [model.final_norm, *(t for layer in model.layers for t in layer.small())]
    return 2 <= model.layers[0].conv.shape[1] <= 8 and all(
        t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in small
    )


class _Recorded:
    """The step that was recorded for a state, and what it was recorded from."""

    def __init__(self, conv_states: Tensor, ssm_states: Tensor, weights: list[Tensor | None], rest: tuple):
        model = PackedModel.from_flat(weights, *rest)
        # Aliases: the table below forgets the step when the caller's own tensor goes.
        states = conv_states.detach(), ssm_states.detach()
        self.step = DecodeStep(model.layers, model.final_norm, model.head, model.eps, *states, model.mixer_eps)
        self._weights, self._addresses, self._rest = weights, self._of(conv_states, ssm_states, weights), rest

    def fits(self, conv_states: Tensor, ssm_states: Tensor, weights: list[Tensor | None], rest: tuple) -> bool:
        same = len(weights) == len(self._weights) and all(map(operator.is_, weights, self._weights))
        return same and rest == self._rest and self._addresses == self._of(conv_states, ssm_states, weights)

    @staticmethod
    def _of(conv_states: Tensor, ssm_states: Tensor, weights: list[Tensor | None]) -> list[int]:
        return [0 if t is None else t.data_ptr() for t in (conv_states, ssm_states, *weights)]


# Of each state, its step: recorded once for a loop that calls the op with the same tensors.
_recorded = WeakIdKeyDictionary()


def decode(x, conv_states, ssm_states, weights, formats, groups, eps, mixer_eps):
    """`mambakit::decode`."""
    rest = (list(formats), list(groups), eps, mixer_eps)
    found = _recorded.get(ssm_states)
    if found is None or not found.fits(conv_states, ssm_states, weights, rest):
        found = _recorded[ssm_states] = _Recorded(conv_states, ssm_states, list(weights), rest)
    return found.step.run(x)
