"""Vision: a small Vim written for mamba_ssm, trained to tell where a faint bar lies in noise; no mamba_ssm installed."""

import mambakit

mambakit.provide()  # before the imports that need mamba_ssm

import torch
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.triton.layer_norm import RMSNorm, rms_norm_fn
from torch import nn


class Vim(nn.Module):
    """Patches read in both directions (arXiv 2401.09417), with a class token in the middle."""

    def __init__(self, width: int = 32, depth: int = 2, patches: int = 16, classes: int = 4):
        super().__init__()
        self.embed = nn.Conv2d(1, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, patches + 1, width) * 0.02)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(depth))
        self.mixers = nn.ModuleList(
            Mamba(width, d_state=8, bimamba_type="v2", if_divide_out=True) for _ in range(depth)
        )
        self.last, self.head = RMSNorm(width), nn.Linear(width, classes)

    def forward(self, images):  # (b, 1, 16, 16)
        x = self.embed(images).flatten(2).transpose(1, 2)  # (b, patches, width)
        middle = x.shape[1] // 2
        x = torch.cat([x[:, :middle], self.token.expand(len(x), -1, -1), x[:, middle:]], 1) + self.positions
        residual = None
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x, residual = rms_norm_fn(x, norm.weight, norm.bias, residual=residual, prenorm=True, eps=norm.eps)
            x = mixer(x)
        return self.head(self.last(x + residual)[:, middle])


def batch(size: int):
    labels = torch.randint(0, 4, (size,))  # the quarter of the rows in which the bar lies
    rows = labels * 4 + torch.randint(0, 4, (size,))
    images = torch.randn(size, 1, 16, 16)
    images[torch.arange(size), 0, rows] += 2
    return images, labels


torch.manual_seed(0)
model = Vim()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(120):
    images, labels = batch(64)
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
images, labels = batch(1000)
with torch.no_grad():
    print(f"accuracy on new images: {(model(images).argmax(-1) == labels).float().mean():.2f} (chance: 0.25)")
