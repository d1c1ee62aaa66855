"""What differs between releases of torch."""

from __future__ import annotations

import torch

from mambakit.ops import _releases
from mambakit.ops._releases import is_exporting


class _Asks(torch.nn.Module):
    def forward(self, x):
        return x + 1 if is_exporting() else x - 1


def test_a_compiled_call_is_no_exported_one():
    """Before 2.13 torch.compile takes `torch.compiler.is_exporting()` for True: whole layers then ran op by op."""
    x = torch.zeros(2)
    assert torch.equal(torch.compile(_Asks(), backend="eager", fullgraph=True)(x), x - 1)
    assert torch.equal(_Asks()(x), x - 1)
    if hasattr(torch.compiler, "is_exporting"):  # 2.7
        assert torch.equal(torch.export.export(_Asks(), (x,)).module()(x), x + 1)


class _Nested:
    """As a result of a layer's op in inductor: its text holds that of what it was computed from, twice."""

    def __init__(self, depth: int):
        self.inner = [_Nested(depth - 1)] * 2 if depth else []

    def __str__(self):
        return "(" + ", ".join(map(str, self.inner)) + ")"


def test_an_ops_arguments_are_not_written_out(monkeypatch):
    """Before 2.13 inductor did, which took 2^n steps for n layers."""
    from torch._inductor.exc import OperatorIssue

    monkeypatch.setattr(_releases, "RELEASE", (2, 11))
    monkeypatch.setattr(OperatorIssue, "operator_str", OperatorIssue.operator_str)
    _releases.bound_messages.cache_clear()
    try:
        _releases.bound_messages()
        text = OperatorIssue.operator_str("an.op", [_Nested(60), 1.0], {"eps": 2})
    finally:
        _releases.bound_messages.cache_clear()
    assert text.split() == ["target:", "an.op", "args:", "_Nested,", "float,", "eps=int"]


def test_a_trace_of_an_op_bounds_them(monkeypatch):
    called = []
    monkeypatch.setattr("mambakit.ops._backends.dispatch.bound_messages", lambda: called.append(True))
    x, w = torch.ones(1, 2, 4), torch.ones(4)
    norm = torch.compile(lambda: torch.ops.mambakit.rms_norm(x, w, None, 1e-5, x.dtype, x.dtype), backend="eager")
    norm()
    assert called
