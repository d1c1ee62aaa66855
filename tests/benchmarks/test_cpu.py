"""The benchmark of a CPU has a step of every format that the kernels have."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cpu import NAMES, RIVALS, decode_step, step_bytes
from mambakit import MambaConfig, MambaForCausalLM
from mambakit.ops._backends import native
from mambakit.ops.linear.cpu import KINDS
from tests.ops.closeness import relative_error

# Of logits to the forward's in float32: what rounding the weights brings.
BOUND = {"float32": 1e-5, "lossless32": 1e-5, "bfloat16": 2e-2, "lossless16": 2e-2, "int8": 2e-2, "int4": 0.3}


@pytest.mark.skipif(not native.supported(), reason="the native kernels are not installed")
@pytest.mark.parametrize("format", KINDS)
def test_every_format_has_a_step_and_a_name(format):
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128)).eval()
    token = torch.tensor([[5]])
    with torch.no_grad():
        step = decode_step(model, format)
        logits = step(model.backbone.embeddings(token)[:, 0])
        assert relative_error(logits, model(token).logits[:, -1]) < BOUND[format]
    assert format in NAMES
    assert format in RIVALS
    assert step_bytes(step) > 0
