"""The initial values of a mixer's own parameters (Gu & Dao 2023, section 3.6 and appendix E), as mamba_ssm draws them.

They are computed like the parameter: on its device, also on meta, and as a sharded tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TimeSteps:
    """The distribution of a new layer's step sizes: the configuration's ``time_step_*`` fields."""

    low: float = 0.001
    high: float = 0.1
    floor: float = 1e-4
    scale: float = 1.0
    scheme: str = "random"

    @classmethod
    def of(cls, config: Any) -> TimeSteps:
        return cls(
            config.time_step_min, config.time_step_max, config.time_step_floor, config.time_step_scale,
            config.time_step_init_scheme,
        )  # fmt: skip

    def bound(self, rank: int) -> float:
        """The projection's weights are uniform within +- this ("random"), or equal to it ("constant").

        The scale keeps the variance of the projection's input.
        """
        return rank**-0.5 * self.scale

    def bias(self, like: Tensor) -> Tensor:
        """The inverse softplus of steps drawn log-uniformly from ``low`` to ``high``, at least ``floor``.

        Its shape and device are those of ``like``.
        """
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        low, high = math.log(self.low), math.log(self.high)
        steps = (torch.empty_like(like, dtype=wide).uniform_() * (high - low) + low).exp().clamp(min=self.floor)
        return steps + torch.log(-torch.expm1(-steps))


def initial_a_log(like: Tensor) -> Tensor:
    """ln(1), ..., ln(n) for every channel, as (d, n) ``like`` (S4D-real)."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.ones_like(like, dtype=wide).cumsum(-1).log()
