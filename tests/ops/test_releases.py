"""What differs between releases of torch."""

from __future__ import annotations

import torch

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
