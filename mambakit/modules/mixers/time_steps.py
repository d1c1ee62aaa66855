"""The projection that gives a Mamba layer its step sizes (arXiv 2312.00752, section 3.6 and algorithm 2, line 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.modules.initialization import TimeSteps
from mambakit.modules.precision import keep_float32
from mambakit.ops._products import linear


class TimeStepProjection(nn.Linear):
    """(r) -> (d), a linear layer whose bias stays float32 when the model is cast to a half dtype.

    With one, the sum is float32, too: near a softplus the rounding of a half would move the steps by per cents. The
    mixer takes the product alone (`product`), and the scan adds the bias right before the softplus, unless this
    module's call is hooked or replaced. A new layer's steps are those that ``steps`` names.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, steps: TimeSteps | None = None, **factory: Any
    ):
        self.steps = steps or TimeSteps()  # nn.Linear draws its parameters when it is made
        super().__init__(in_features, out_features, bias, **factory)
        if self.bias is not None and self.bias.dtype.itemsize == 2:  # made in half: its rounding would move the steps
            self.bias = nn.Parameter(self.steps.bias(self.bias))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = self.steps.bound(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)  # for a constant, too: what is drawn after it is the same
        if self.steps.scheme == "constant":
            nn.init.constant_(self.weight, bound)
        if self.bias is not None and not self.bias.is_meta:  # see `Mixer.reset_own_parameters`
            self.bias.copy_(self.steps.bias(self.bias))

    def forward(self, input: Tensor) -> Tensor:
        product = self.product(input)
        return product if self.bias is None else product + self.bias

    def product(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)

    def _apply(self, fn: Callable, recurse: bool = True):
        return super()._apply(lambda t: keep_float32(fn, t) if t.dim() == 1 else fn(t), recurse)
