"""The sizes and settings of Mamba layers that belong to no model: what `MambaMixer` and `MambaBlock` read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from mambakit.quoting import brief


@dataclass
class LayerConfig:
    """A configuration for layers in a network of one's own; it needs torch alone.

    Names, defaults and meanings are those of transformers' `MambaConfig`, which layers take as well.

    Attributes:
        hidden_size: h, of the layer's input and output.
        state_size: n. conv_kernel: k.
        expand: the inner channels are d = expand * hidden_size.
        time_step_rank: r; "auto": ceil(hidden_size / 16).
        use_bias, use_conv_bias: biases of the projections, and of the convolution.
        hidden_act: after the convolution; "silu" needs torch alone, the others are transformers' activations.
        time_step_*: the distribution of a new layer's step sizes.
        layer_norm_epsilon, residual_in_fp32: of `MambaBlock`.
        mixer_rms_eps: of FalconMamba's and Jamba's RMS norms of dt, B and C; None: plain Mamba, without norms.
        mixer_norm_weights: the norms of dt, B and C have weights, as Jamba's dt_layernorm, b_layernorm and c_layernorm.
        num_hidden_layers, dtype: of the state that `new_cache` makes for all layers.
        intermediate_size: d, computed.
    """

    hidden_size: int
    state_size: int = 16
    conv_kernel: int = 4
    expand: float = 2
    time_step_rank: int | str = "auto"
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_scale: float = 1.0
    time_step_init_scheme: str = "random"
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    mixer_rms_eps: float | None = None
    mixer_norm_weights: bool = False
    num_hidden_layers: int = 1
    dtype: torch.dtype = torch.float32
    intermediate_size: int = field(init=False)

    def __post_init__(self) -> None:
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        for name in ("hidden_size", "state_size", "conv_kernel", "time_step_rank", "num_hidden_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {brief(value)}; it must be a whole number of 1 or more")
        eps = self.mixer_rms_eps
        if eps is not None and (isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1):
            raise ValueError(
                f"mixer_rms_eps is {brief(eps)}; it must be a number above 0 and below 1, or None without norms"
            )
        if self.mixer_norm_weights and eps is None:
            raise ValueError(
                f"mixer_norm_weights is {brief(self.mixer_norm_weights)} and mixer_rms_eps is None: there are no norms "
                "to have weights; set mixer_rms_eps (Jamba: 1e-6)"
            )
        inner = self.expand * self.hidden_size
        if inner < 1 or inner != int(inner):
            raise ValueError(
                f"expand is {brief(self.expand)}: expand * hidden_size, the inner channels, must be a whole number "
                f"of 1 or more, and is {inner:g}"
            )
        self.intermediate_size = int(inner)
