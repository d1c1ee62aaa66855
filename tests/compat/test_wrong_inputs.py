"""Operands that cannot be right: each raises an error that names them, and none is computed with in silence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mambakit.compat.convolution import causal_conv1d_fn, causal_conv1d_update
from mambakit.compat.inner import mamba_inner_fn
from mambakit.compat.mamba import Mamba
from mambakit.compat.norm import layer_norm_fn
from mambakit.compat.selective_scan import selective_scan_fn
from mambakit.compat.state_update import selective_state_update

b, d, length, n, r = 2, 8, 5, 4, 3


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


SCAN = {
    "u": draw(b, d, length),
    "delta": draw(b, d, length),
    "A": -draw(d, n).abs(),
    "B": draw(b, n, length),
    "C": draw(b, n, length),
}
UPDATE = {
    "state": draw(b, d, n), "x": draw(b, d), "dt": draw(b, d), "A": SCAN["A"], "B": draw(b, n), "C": draw(b, n),
}  # fmt: skip
CONVOLUTION = {"x": draw(b, d, length), "weight": draw(d, 4)}
STEP = {"x": draw(b, d), "conv_state": draw(b, d, 4), "weight": draw(d, 4)}
NORM = {"x": draw(b, d), "weight": draw(d), "bias": draw(d)}
INNER = {
    "xz": draw(b, 2 * d, length), "conv1d_weight": draw(d, 1, 4), "conv1d_bias": None,
    "x_proj_weight": draw(r + 2 * n, d), "delta_proj_weight": draw(d, r), "out_proj_weight": draw(6, d),
    "out_proj_bias": None, "A": SCAN["A"],
}  # fmt: skip
INDICES = torch.zeros(b, dtype=torch.int32)


def refused(function, given: dict, changes: dict, message: str) -> None:
    """``function`` takes ``given``, and not with ``changes``."""
    function(**{name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in given.items()})
    with pytest.raises((ValueError, TypeError), match=message):
        function(**given | changes)


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (selective_scan_fn, SCAN), (selective_state_update, UPDATE), (causal_conv1d_fn, CONVOLUTION),
        (causal_conv1d_update, STEP), (mamba_inner_fn, INNER),
    ],
)  # fmt: skip
def test_every_operand_is_a_tensor(function, given):
    for name, value in given.items():
        if value is not None and name != "out_proj_weight":
            refused(function, given, {name: value.numpy()}, f"{name} is a ndarray, expected a tensor")
            refused(function, given, {name: None}, f"{name} is a NoneType, expected a tensor")


@pytest.mark.parametrize("rows", [r + 2 * n - 1, r + 2 * n + 1, r + n])
def test_a_selection_of_another_size(rows):
    message = rf"x_proj_weight has shape \({rows}, 8\), expected \(r \+ 2 n, d\) = \(11, 8\)"
    refused(mamba_inner_fn, INNER, {"x_proj_weight": draw(rows, d)}, message)


def test_a_given_selection_needs_fewer_rows():
    for x_proj in (draw(r + n, d), draw(r + 2 * n, d)):
        mamba_inner_fn(**INNER | {"x_proj_weight": x_proj, "B": SCAN["B"]})
    with pytest.raises(ValueError, match=r"expected \(r \+ 1 n, d\) = \(7, 8\)"):
        mamba_inner_fn(**INNER | {"x_proj_weight": draw(r + n - 1, d), "B": SCAN["B"]})


def test_an_output_projection_of_another_width():
    refused(mamba_inner_fn, INNER, {"out_proj_weight": draw(6, d + 1)}, r"expected \(h, d\) with d = 8")


@pytest.mark.parametrize(
    ("function", "given", "name"),
    [
        (causal_conv1d_update, STEP, "cache_seqlens"), (causal_conv1d_update, STEP, "conv_state_indices"),
        (selective_state_update, UPDATE, "state_batch_indices"),
    ],
)  # fmt: skip
def test_numbers_of_slots(function, given, name):
    refused(function, given | {name: INDICES}, {name: INDICES.float()}, f"{name} is torch.float32, expected integers")
    refused(function, given | {name: INDICES}, {name: INDICES.bool()}, f"{name} is torch.bool, expected integers")
    refused(function, given | {name: INDICES}, {name: INDICES[:1]}, rf"{name} has shape \(1,\), expected \(b,\)")
    refused(function, given | {name: INDICES}, {name: INDICES[:, None]}, rf"{name} has shape \(2, 1\)")


def test_numbers_of_sequences():
    numbers = torch.zeros(b, length, dtype=torch.int32)
    given = CONVOLUTION | {"seq_idx": numbers}
    refused(causal_conv1d_fn, given, {"seq_idx": numbers.float()}, "seq_idx is torch.float32, expected integers")
    refused(causal_conv1d_fn, given, {"seq_idx": numbers[:1]}, r"seq_idx has shape \(1, 5\)")


def test_more_states_than_rows():
    refused(
        selective_state_update, UPDATE, {"state": draw(b + 1, d, n)}, "state has 3 rows, x 2; .*state_batch_indices"
    )


@pytest.mark.parametrize("is_rms_norm", [True, False])
def test_norms(is_rms_norm):
    given = NORM | {"is_rms_norm": is_rms_norm}
    for name in ("weight", "bias"):
        for size in (1, d + 1):
            refused(layer_norm_fn, given, {name: draw(size)}, rf"{name} has shape \({size},\), expected \(h,\)")
    refused(layer_norm_fn, given, {"x1": draw(1, d)}, r"x1 has shape \(1, 8\), expected \(2, 8\)")
    refused(layer_norm_fn, given, {"rowscale": draw(1)}, r"rowscale has shape \(1,\), expected \(2,\)")
    for p in (-0.1, 1.5):
        refused(layer_norm_fn, given, {"dropout_p": p}, f"dropout_p is {p}; it must be from 0 to 1")


def test_all_is_dropped():
    y, total = layer_norm_fn(**NORM, residual=draw(b, d), dropout_p=1.0, prenorm=True)
    assert torch.equal(total, draw(b, d))
    assert torch.isfinite(y).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 0}, "d_model is 0"), ({"d_model": -4}, "d_model is -4"), ({"d_model": 16.0}, "d_model is 16.0"),
        ({"d_state": 0}, "d_state is 0"), ({"d_conv": 0}, "d_conv is 0"), ({"expand": 0}, r"expand \* d_model is 0"),
        ({"dt_rank": 0}, "dt_rank is 0"), ({"dt_rank": "full"}, "dt_rank 'full' is neither a number nor 'auto'"),
        ({"nslices": 0}, "nslices is 0"), ({"dt_min": 0.0}, "dt_min is 0.0 and dt_max 0.1; both must be above 0"),
    ],
)  # fmt: skip
def test_layers_of_impossible_sizes(fields, message):
    with pytest.raises(ValueError, match=message):
        Mamba(**{"d_model": 8} | fields)


def test_sizes_of_numpy_s():
    assert Mamba(np.int64(8), d_state=np.int32(4))(draw(1, 3, 8)).shape == (1, 3, 8)
