"""The shape of a Mamba model, and what follows from it without making one: parameters, state, operations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a Mamba-1 model; names and defaults are those of transformers' `MambaConfig`."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    state_size: int = 16
    expand: int = 2
    conv_kernel: int = 4
    tie_word_embeddings: bool = True
    time_step_rank: int | None = None
    """None: a sixteenth of hidden_size, rounded up."""

    @staticmethod
    def of(config: Any) -> Shape:
        """The shape of a model's or a training run's configuration."""
        # FalconMamba's expand is not what its intermediate_size says; the weights have the latter.
        inner = getattr(config, "intermediate_size", config.expand * config.hidden_size)
        rank = getattr(config, "time_step_rank", None)
        return Shape(
            config.hidden_size, config.num_hidden_layers, config.vocab_size, config.state_size,
            round(inner / config.hidden_size), config.conv_kernel, bool(config.tie_word_embeddings),
            None if rank in (None, math.ceil(config.hidden_size / 16)) else rank,
        )  # fmt: skip

    @property
    def inner(self) -> int:
        """d, the inner channels."""
        return self.expand * self.hidden_size

    @property
    def linear(self) -> int:
        """Weights of a layer's four projections."""
        h, d, n = self.hidden_size, self.inner, self.state_size
        r = self.time_step_rank or math.ceil(h / 16)
        return h * 2 * d + d * (r + 2 * n) + r * d + d * h

    @property
    def parameters(self) -> int:
        h, d, n = self.hidden_size, self.inner, self.state_size
        # Beside the projections: dt_proj's bias, convolution, A_log, D, norm.
        layer = self.linear + d + d * (self.conv_kernel + 1) + d * n + d + h
        heads = 1 if self.tie_word_embeddings else 2
        return heads * self.vocab_size * h + self.num_hidden_layers * layer + h

    def state_bytes(self, size: int) -> int:
        """Bytes of the state of one sequence: float32, and the convolution's window in ``size`` bytes a number."""
        return self.num_hidden_layers * self.inner * (4 * self.state_size + size * (self.conv_kernel - 1))

    @property
    def flops(self) -> float:
        """Operations of a training step for each token, as `mambakit.training.throughput` counts them."""
        scan = self.num_hidden_layers * self.inner * (2 * self.conv_kernel + 8 * self.state_size)
        return 3.0 * (2 * (self.num_hidden_layers * self.linear + self.vocab_size * self.hidden_size) + scan)


# The shapes of the published checkpoints, of which benchmarks are recorded.
PUBLISHED = {
    "130m": Shape(768, 24, 50280),
    "370m": Shape(1024, 48, 50280),
    "790m": Shape(1536, 48, 50280),
    "1.4b": Shape(2048, 48, 50280),
    "2.8b": Shape(2560, 64, 50280),
}
