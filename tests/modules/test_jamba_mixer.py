"""A mixer with weights of the norms of dt, B and C beside transformers' Jamba mixer, with the same weights."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers.models.jamba.modeling_jamba import JambaMambaMixer  # noqa: E402

from mambakit.modules import LayerConfig, MambaMixer  # noqa: E402
from tests.ops.closeness import relative_error  # noqa: E402

SHAPES = {
    "plain": ({"mamba_d_state": 16, "mamba_dt_rank": 3}, {"state_size": 16, "time_step_rank": 3}),
    "odd": (
        {"mamba_d_state": 5, "mamba_d_conv": 3, "mamba_dt_rank": 7, "mamba_conv_bias": False, "mamba_proj_bias": True},
        {"state_size": 5, "conv_kernel": 3, "time_step_rank": 7, "use_conv_bias": False, "use_bias": True},
    ),
}


def mixers(shape: str) -> tuple[MambaMixer, JambaMambaMixer]:
    torch.manual_seed(0)
    theirs_config, ours_config = SHAPES[shape]
    config = transformers.JambaConfig(
        hidden_size=32, mamba_expand=2, rms_norm_eps=1e-3, num_hidden_layers=1,
        **theirs_config,
    )  # fmt: skip
    theirs = JambaMambaMixer(config, 0)
    ours = MambaMixer(LayerConfig(32, mixer_rms_eps=1e-3, mixer_norm_weights=True, **ours_config))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 9])
def test_outputs_and_gradients(shape, length):
    ours, theirs = mixers(shape)
    x, dy = torch.randn(2, length, 32), torch.randn(2, length, 32)
    found = []
    for mixer in (ours, theirs):
        given = x.clone().requires_grad_()
        y = mixer(given)
        (y * dy).sum().backward()
        found.append({"y": y, "dx": given.grad} | {name: p.grad for name, p in mixer.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        if length == 1 and name == "A_log":
            continue  # from a state of zeros it has no gradient: rounding is all that is left of it
        assert relative_error(value, found[1][name]) < 1e-5, name
