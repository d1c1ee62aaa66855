"""What `mambakit env` prints of the ops is true of the dispatcher."""

from __future__ import annotations

import torch

import mambakit.modules  # noqa: F401, defines the ops of layers
from mambakit.ops._backends import dispatch, native
from mambakit.ops.implementations import OPS, implementations
from mambakit.ops.sampling import schema  # noqa: F401, defines it

# Parts of an op: its gradient, its in-place form, its overload for loops, what its gradient reads.
_PART_OF = {
    "dequantize": "linear",
    "normed_linear": "linear",
    "whole_layer": "fused_mixer",
    "whole_layer_forward": "fused_mixer",
}


def whole(name: str) -> str:
    name = name.partition(".")[0].removesuffix("_").removesuffix("_backward")
    return _PART_OF.get(name, name)


def test_every_op_of_the_library_has_a_row():
    assert {whole(name) for name in dispatch._plain} == set(OPS)


def test_native_is_said_where_a_kernel_is_registered():
    for row in implementations():
        if row.device != "cpu":
            continue
        on_cpu = torch._C._dispatch_has_kernel_for_dispatch_key(f"mambakit::{row.op}", "CPU")
        assert row.serves.startswith("C++") == (on_cpu and row.op != "sample" and native.is_available()), row
