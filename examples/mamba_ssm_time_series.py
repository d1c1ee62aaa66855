"""Time series: a forecaster written for mamba_ssm, over several noisy periodic series; no mamba_ssm installed."""

import math

import mambakit

mambakit.provide()  # before the imports that need mamba_ssm

import torch
from mamba_ssm import Mamba
from torch import nn

HISTORY, HORIZON, SERIES = 96, 24, 5


class Forecaster(nn.Module):
    """Each step's values are a token; the last token's output is the forecast of the next steps."""

    def __init__(self, width: int = 48, depth: int = 2):
        super().__init__()
        self.embed = nn.Linear(SERIES, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.mixers = nn.ModuleList(Mamba(d_model=width, d_state=16, d_conv=4, expand=2) for _ in range(depth))
        self.head = nn.Linear(width, HORIZON * SERIES)

    def forward(self, history):  # (b, l, series)
        mean, scale = history.mean(1, keepdim=True), history.std(1, keepdim=True) + 1e-5
        x = self.embed((history - mean) / scale)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(x[:, -1]).unflatten(-1, (HORIZON, SERIES)) * scale + mean


def batch(size: int):
    """Sums of a daily and a weekly period, of other phases and strengths in every series, with noise."""
    time = torch.arange(HISTORY + HORIZON)[None, :, None] + torch.randint(0, 1000, (size, 1, 1))
    phase, strength = torch.arange(SERIES) * 1.3, 1 + torch.arange(SERIES) / SERIES
    values = strength * torch.sin(2 * math.pi * time / 24 + phase) + torch.sin(2 * math.pi * time / 84 + phase)
    values = values + 0.1 * torch.randn(values.shape)
    return values[:, :HISTORY], values[:, HISTORY:]


torch.manual_seed(0)
model = Forecaster()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(150):
    history, future = batch(32)
    loss = nn.functional.mse_loss(model(history), future)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
history, future = batch(200)
with torch.no_grad():
    error = (model(history) - future).square().mean()
yesterday = (history[:, -24:] - future).square().mean()
print(f"squared error of the forecast: {error:.3f} (the day before as the forecast: {yesterday:.3f})")
