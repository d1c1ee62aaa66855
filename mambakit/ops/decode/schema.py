"""`mambakit::decode`, one token of each row through a whole model, as a torch.library op. It has no gradient.

`decode` takes every weight, so it can be compiled and exported; `packed.py` says how they are listed. `decode.prepared`
takes the handle of a `DecodeStep` in the place of the weights: passing hundreds of tensors costs more host time than a
small model's step, and a loop over tokens passes the same ones each time.
"""

from __future__ import annotations

import torch

from mambakit.ops._backends.dispatch import define, implement_on_cpu
from mambakit.ops.decode import chunked, cpu

_STATES = "Tensor x, Tensor(a!) conv_states, Tensor(b!) ssm_states"


def _fake(x, conv_states, ssm_states, weights, formats, groups, eps, mixer_eps):
    head = weights[-5]  # the first of a packed weight's five tensors has its rows
    return x.new_empty((x.shape[0], head.shape[0]), dtype=torch.float32)


def _prepared_fake(x, conv_states, ssm_states, step, vocabulary):
    return x.new_empty((x.shape[0], vocabulary), dtype=torch.float32)


def _not_prepared(x, *_):
    raise NotImplementedError(
        f"decode.prepared: x is a {type(x).__name__} on {x.device}; a prepared step takes plain tensors on the CPU"
    )


define(
    f"decode({_STATES}, Tensor?[] weights, str[] formats, int[] groups, float eps, float? mixer_eps) -> Tensor",
    chunked.decode,
    _fake,
)
define(f"decode.prepared({_STATES}, int step, int vocabulary) -> Tensor", _not_prepared, _prepared_fake)
implement_on_cpu("decode", cpu.decode, cpu.serves)
implement_on_cpu("decode.prepared", cpu.prepared, lambda *_: True)
