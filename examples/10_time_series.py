"""A forecast with MambaStack where an LSTM would stand: trained over whole sequences, then used value by value."""

import argparse
import math

import torch
from torch import nn

from mambakit.nn import MambaStack

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
arguments = parser.parse_args()
AHEAD, LENGTH = 10, 120


def waves(rows: int) -> torch.Tensor:
    """Two waves of unknown period, size and phase each, and noise: what comes next follows from what was seen."""
    t = torch.arange(LENGTH + AHEAD, dtype=torch.float32)
    periods, phases = 8 + 16 * torch.rand(rows, 2, 1), 2 * math.pi * torch.rand(rows, 2, 1)
    return (torch.rand(rows, 2, 1) * torch.sin(2 * math.pi * t / periods + phases)).sum(1)


class Forecaster(nn.Module):
    def __init__(self, layer: nn.Module, width: int):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.layer(x)
        return self.head(y)[..., 0]


def train(model: Forecaster) -> float:
    """Root mean square error of the forecast of each row's last half, new rows, after training."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(arguments.steps + 1):
        clean = waves(32 if step < arguments.steps else 256)
        seen = clean[:, :LENGTH] + 0.05 * torch.randn(len(clean), LENGTH)
        error = (model(seen[..., None]) - clean[:, AHEAD:])[:, LENGTH // 2 :].square().mean()
        if step < arguments.steps:
            error.backward()
            optimizer.step()
            optimizer.zero_grad()
    return error.sqrt().item()


torch.manual_seed(0)
mamba = Forecaster(MambaStack(1, 24, 2, batch_first=True), 24)
lstm = Forecaster(nn.LSTM(1, 32, 2, batch_first=True), 32)
for name, model in (("MambaStack", mamba), ("LSTM", lstm)):
    count = sum(p.numel() for p in model.parameters())
    print(f"{name:10} {count:6,} parameters: error {train(model):.3f} (waves of about 0.6)")

# In use: one value at a time, the state carried. It is the same as reading the whole series again.
series, state = waves(1)[:, :LENGTH], None
with torch.no_grad():
    for value in series[0]:
        y, state = mamba.layer.step(value.view(1, 1), state)
    print(f"value by value {float(mamba.head(y)):.5f}, at once {float(mamba(series[..., None])[0, -1]):.5f}")
