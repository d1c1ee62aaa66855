"""Transformer++: the baseline (RoPE, SwiGLU, RMSNorm, no biases; arXiv 2312.00752, section 4.2.1 and appendix E.2).

Attention is PyTorch's `scaled_dot_product_attention` (FlashAttention on CUDA), the norm and the loss are mambakit's own
ops, so that both contenders run on kernels of the same quality and differ in the mixer alone.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.modules import RMSNorm

_STD = 0.02  # of every matrix at first; those that write to the residual stream are divided by sqrt(2 layers)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """``head_size`` is even; ``feed_forward`` is SwiGLU's inner width; ``max_length`` bounds the rotary table."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    feed_forward: int
    head_size: int = 64
    max_length: int = 2048
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.hidden_size % self.head_size or self.head_size % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not made of heads of {self.head_size}; choose an even head_size "
                "that divides it"
            )


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        h = config.hidden_size
        self.heads, self.head_size = h // config.head_size, config.head_size
        self.qkv = nn.Linear(h, 3 * h, bias=False)
        self.out = nn.Linear(h, h, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, length, h = x.shape
        qkv = (
            self.qkv(x).view(b, length, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        )  # (3, b, heads, l, size)
        q, k = rotate(qkv[:2], cos, sin)
        y = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, length, h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of (..., l, size), halves paired; tables (l, size / 2) float32."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): (silu(x W) * x V) U."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.feed_forward, bias=False)
        self.down = nn.Linear(config.feed_forward, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention_norm, self.feed_forward_norm = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)
        self.attention, self.feed_forward = Attention(config), FeedForward(config)

    def forward(self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        y, residual = self.attention_norm(x, residual, torch.float32)
        y, residual = self.feed_forward_norm(self.attention(y, cos, sin), residual, torch.float32)
        return self.feed_forward(y), residual


class Transformer(nn.Module):
    """Causal language model with a tied head; ``forward`` returns what the head reads."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        size = config.head_size
        angles = torch.outer(
            torch.arange(config.max_length, dtype=torch.float32),
            config.rope_base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size),
        )
        self.register_buffer("cos", angles.cos(), persistent=False)  # (max_length, size / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=_STD)
        if isinstance(module, TransformerBlock):
            scale = (2 * self.config.num_hidden_layers) ** -0.5
            with torch.no_grad():
                module.attention.out.weight.mul_(scale)
                module.feed_forward.down.weight.mul_(scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l) int64 -> (b, l, h) after the final norm.

        Raises:
            ValueError: rows longer than ``max_length``.
        """
        length = tokens.shape[1]
        if length > self.config.max_length:
            raise ValueError(f"{length} tokens exceed max_length {self.config.max_length}; raise it or cut the rows")
        cos, sin = self.cos[:length], self.sin[:length]
        x, residual = self.embeddings(tokens), None
        for block in self.layers:
            x, residual = block(x, residual, cos, sin)
        return self.norm(x, residual, torch.float32)[0]
