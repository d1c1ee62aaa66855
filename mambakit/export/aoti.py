"""`to_aoti`: a package for C++ without Python (AOTInductor), of one token of any batch, state in and state out.

mambakit's ops are registered from Python, so the step is written in PyTorch's own: one token is a few small products
for each layer. A prompt is read token by token.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from mambakit.errors import UsageError
from mambakit.export.checks import LARGEST_BATCH, require_exportable, require_same
from mambakit.modules.cache import MambaCache


class TokenStep(nn.Module):
    """(input_ids (b, 1), conv_states (layers, b, d, k - 1), ssm_states (layers, b, d, n)) -> (logits (b, 1, v), both
    states after the token). Float32, PyTorch's own operations alone."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Tensor, conv_states: Tensor, ssm_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        backbone, eps = self.model.backbone, self.config.layer_norm_epsilon
        x = F.embedding(input_ids[:, 0], backbone.embeddings.weight)  # (b, h)
        convolved, scanned = [], []
        for i in range(self.config.num_hidden_layers):
            block = backbone.layers[i]
            y, conv, ssm = self._mixer(block.mixer, _norm(x, eps) * block.norm.weight, conv_states[i], ssm_states[i])
            x = x + y
            convolved.append(conv)
            scanned.append(ssm)
        logits = F.linear(_norm(x, eps) * backbone.norm_f.weight, self.model.lm_head.weight)
        return logits[:, None], torch.stack(convolved), torch.stack(scanned)

    def _mixer(self, mixer: Any, x: Tensor, conv: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, h), and the layer's states, to the same after the token."""
        r, n = int(self.config.time_step_rank), self.config.state_size
        u, z = F.linear(x, mixer.in_proj.weight, mixer.in_proj.bias).chunk(2, -1)  # (b, d)
        window = torch.cat([conv, u[..., None]], -1)  # (b, d, k)
        u = (window * mixer.conv1d.weight[:, 0]).sum(-1)
        u = F.silu(u if mixer.conv1d.bias is None else u + mixer.conv1d.bias)
        steps, b, c = F.linear(u, mixer.x_proj.weight).split([r, n, n], -1)
        if (eps := getattr(self.config, "mixer_rms_eps", None)) is not None:  # FalconMamba's
            steps, b, c = (_norm(t, eps) for t in (steps, b, c))
        delta = F.softplus(F.linear(steps, mixer.dt_proj.weight, mixer.dt_proj.bias))  # (b, d)
        decay = torch.exp(delta[..., None] * -torch.exp(mixer.A_log.float()))
        state = decay * state + (delta * u)[..., None] * b[:, None]  # (b, d, n)
        y = ((state * c[:, None]).sum(-1) + mixer.D * u) * F.silu(z)
        return F.linear(y, mixer.out_proj.weight, mixer.out_proj.bias), window[..., 1:], state


def _norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def require_compiler() -> None:
    """UsageError where there is no C++ compiler, which AOTInductor calls."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl")):
        raise UsageError("AOTInductor compiles C++, and there is no compiler here; install g++ or clang++")


def to_aoti(model: Any, file: Path) -> None:
    """Write the package of a float32 model; C++ reads it with torch::inductor::AOTIModelPackageLoader.

    Raises:
        CheckpointError: no causal language model, one without layers, or another activation than silu.
        UsageError: there is no compiler.
    """
    require_compiler()
    require_exportable(model, only_silu="the package")
    step = TokenStep(model.eval())
    cache = MambaCache(model.config, 2, model.device, torch.float32)
    ids = torch.zeros(2, 1, dtype=torch.int64, device=model.device)
    batch = Dim("batch", min=1, max=LARGEST_BATCH)
    with torch.no_grad():
        program = torch.export.export(
            step, (ids, cache.conv_states.clone(), cache.ssm_states.clone()),
            dynamic_shapes=({0: batch}, {1: batch}, {1: batch}),
        )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    torch._inductor.aoti_compile_and_package(program, package_path=str(file))


def check(model: Any, file: Path, tokens: int = 9) -> float:
    """`require_same` of the package, token by token."""
    return require_same(model, f"{file}: the package", torch._inductor.aoti_load_package(str(file)), (1,) * tokens)
