"""What a mixer reads of a configuration, for a stack that has none of transformers'."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StackSettings:
    """The fields of a `MambaConfig` that a mixer, its state and its initial values take.

    Attributes:
        num_hidden_layers: mixers: layers times directions.
    """

    hidden_size: int
    num_hidden_layers: int
    state_size: int
    conv_kernel: int
    expand: int
    intermediate_size: int = field(init=False)
    time_step_rank: int = field(init=False)
    model_type: str = "mamba_stack"
    vocab_size: None = None
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_scale: float = 1.0
    time_step_init_scheme: str = "random"

    def __post_init__(self) -> None:
        object.__setattr__(self, "intermediate_size", self.expand * self.hidden_size)
        object.__setattr__(self, "time_step_rank", math.ceil(self.hidden_size / 16))
