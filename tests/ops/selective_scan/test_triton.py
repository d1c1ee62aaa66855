"""The Triton scan: its logic under Triton's interpreter (a process of its own, since the choice is made at import)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

_CHECK = """
# bfloat16: the interpreter truncates where a GPU rounds, twice the error
import torch
from mambakit.ops.selective_scan import triton as kernel
from mambakit.ops.selective_scan import chunked

torch.manual_seed(0)
error = lambda a, b: float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)) if a.numel() else 0.0
cases = [
    # b, l, d, n, packed lengths, with optional arguments, dtype
    (2, 1, 3, 4, None, True, torch.float32),
    (1, 70, 33, 16, None, True, torch.float32),
    (2, 37, 5, 5, None, False, torch.float32),
    (1, 75, 8, 8, [0, 3, 40, 1, 0, 31], True, torch.float32),
    (2, 33, 8, 16, None, True, torch.bfloat16),
]
for b, l, d, n, lengths, full, dtype in cases:
    s = b if lengths is None else len(lengths)
    cu = None if lengths is None else torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    wide = torch.randn(b, l, 2 * d + 2 * n).to(dtype)
    u, delta, B, C = wide.split([d, d, n, n], -1)
    A = -torch.rand(d, n) * 3
    D, z, bias = (torch.randn(d), torch.randn(b, l, d).to(dtype), torch.randn(d)) if full else (None, None, None)
    initial = torch.randn(s, d, n) if full else None
    delta = delta if full else delta.abs()
    arguments = (u, delta, A, B, C, D, z, bias, full, initial, cu)
    double = tuple(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments)
    half = dtype != torch.float32
    out = kernel.forward(*arguments, 32)
    expected = chunked.forward(*double, 32)
    for name, x, y in zip(("y", "final", "checkpoints"), out, expected):
        if name == "checkpoints" and cu is not None:
            continue  # where a sequence starts on the grid its value is free
        assert x.shape == y.shape and error(x, y) < (7e-3 if half and name == "y" else 1e-5), (name, error(x, y))
    dy, dfinal = torch.randn(b, l, d).to(dtype), torch.randn(s, d, n)
    grads = kernel.backward(dy, dfinal, *arguments, out[2], 32)
    wanted = chunked.backward(dy.double(), dfinal.double(), *double, expected[2], 32)
    for i, (x, y) in enumerate(zip(grads, wanted)):
        assert x.shape == y.shape and error(x, y) < (7e-3 if half else 1e-5), (i, error(x, y))
    pool = torch.randn(s + 1, d, n)
    slots = torch.tensor([s, *([-1] if s > 1 else []), *range(s - 2)], dtype=torch.int32)
    a, c = pool.clone(), pool.clone()
    y1 = kernel.forward_(a, slots, *arguments[:9], cu)
    y2 = chunked.forward_(c, slots, *arguments[:9], cu)
    assert error(y1, y2) < (7e-3 if half else 1e-5) and error(a, c) < 1e-5
print("all right")
"""


def test_the_kernels_logic():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", _CHECK], env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all right" in done.stdout
