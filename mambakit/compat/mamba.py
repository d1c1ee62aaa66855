"""`Mamba` of mamba_ssm, and of Vim, VideoMamba and SegMamba where it reads a sequence in several directions."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.compat.convolution import causal_conv1d_update
from mambakit.compat.forms import parameter_dtype, require
from mambakit.compat.mamba_direction import Direction, decay
from mambakit.compat.mamba_start import initial_a_log, initial_d, start_steps
from mambakit.compat.replaced import LAYER
from mambakit.compat.state_update import selective_state_update
from mambakit.modules.interception import is_causal, untouched
from mambakit.modules.mixers import fused_layer
from mambakit.modules.projection import project
from mambakit.ops import selective_scan

# bimamba_type -> what each direction's parameters end in; "v1" shares all but A.
_DIRECTIONS = {"none": (), "v1": ("_b",), "v2": ("_b",), "v3": ("_b", "_s")}


class Mamba(nn.Module):
    """The selective state space layer with mamba_ssm's interface, weights, names and initial values.

    A seed gives the weights that it gives upstream: the random numbers are drawn in the same order.

    Args:
        d_model, d_state, d_conv, expand, dt_rank: h, n, k, d / h, and r ("auto": ceil(h / 16)).
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor: the first time steps (arXiv 2312.00752, section 3.6).
        use_fast_path: kept; there is one path, which calls a submodule that is replaced or hooked.
        layer_idx: which states of ``inference_params`` are this layer's.
        bimamba_type: "none"; "v1", "v2" (Vim): also backwards, with a second A, or a second set of parameters; "v3"
            (SegMamba): "v2", and over ``nslices`` interleaved slices with a third set.
        bimamba: VideoMamba's name for "v2".
        if_divide_out, if_devide_out: the mean of both directions in place of their sum; the second is Vim's spelling.
        init_layer_scale: a learned factor (d_model,) of the output that starts at this value.
    """

    mixer_rms_eps: float | None = None
    """There are no norms of dt, B and C."""
    # What a layer has that was pickled whole by mamba_ssm itself.
    bimamba_type, if_divide_out, init_layer_scale, nslices = "none", False, None, 5

    conv1d: Any  # set by name, one for each direction
    dt_proj: Any

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        nslices: int = 5,
        bimamba: bool = False,
        if_devide_out: bool = False,
    ):
        super().__init__()
        bimamba_type = "v2" if bimamba and bimamba_type == "none" else bimamba_type
        require(bimamba_type in _DIRECTIONS, f"bimamba_type {bimamba_type!r} is not one of {sorted(_DIRECTIONS)}")
        require(dt_init in ("random", "constant"), f"dt_init {dt_init!r} is not 'random' or 'constant'")
        require(
            dt_rank == "auto" or not isinstance(dt_rank, str), f"dt_rank {dt_rank!r} is neither a number nor 'auto'"
        )
        require(min(dt_min, dt_max) > 0, f"dt_min is {dt_min} and dt_max {dt_max}; both must be above 0")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "expand * d_model": self.d_inner}
        for name, size in (sizes | {"dt_rank": self.dt_rank, "nslices": nslices}).items():
            require(
                isinstance(size, numbers.Integral) and size > 0,
                f"{name} is {size!r}; it must be a whole number above 0",
            )
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.bimamba_type, self.nslices = bimamba_type, nslices
        self.if_divide_out = if_divide_out or if_devide_out
        self.init_layer_scale = init_layer_scale
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model, device=device))
        d, n = self.d_inner, d_state
        self.activation, self.act = "silu", nn.SiLU()
        self.in_proj = nn.Linear(d_model, 2 * d, bias=bias, **factory)
        self._add_selection("", conv_bias, factory)
        start_steps(self.dt_proj, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self.A_log, self.D = initial_a_log(d, n, device), initial_d(d, device)
        for suffix in _DIRECTIONS[bimamba_type]:
            if bimamba_type == "v1":
                self.A_b_log = initial_a_log(d, n, device)
                continue
            log = f"A{suffix}_log"
            setattr(self, log, initial_a_log(d, n, device))
            self._add_selection(suffix, conv_bias, factory)
            setattr(self, f"D{suffix}", initial_d(d, device))
        self.out_proj = nn.Linear(d, d_model, bias=bias, **factory)

    @property
    def if_devide_out(self) -> bool:
        return self.if_divide_out

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What was pickled whole by Vim or VideoMamba has the same settings under their names."""
        super().__setstate__(state)
        own = self.__dict__
        if "if_devide_out" in own:
            self.if_divide_out = own.pop("if_devide_out")
        if own.get("bimamba") and "bimamba_type" not in own:
            self.bimamba_type = "v2"

    def _add_selection(self, suffix: str, conv_bias: bool, factory: dict[str, Any]) -> None:
        """One direction's convolution and projections."""
        d, k, r, n = self.d_inner, self.d_conv, self.dt_rank, self.d_state
        conv = nn.Conv1d(d, d, k, groups=d, padding=k - 1, bias=conv_bias, **factory)
        setattr(self, f"conv1d{suffix}", conv)
        setattr(self, f"x_proj{suffix}", nn.Linear(d, r + 2 * n, bias=False, **factory))
        setattr(self, f"dt_proj{suffix}", nn.Linear(r, d, bias=True, **factory))

    def forward(self, hidden_states: Tensor, inference_params: Any = None, T: int = 1) -> Tensor:
        """(b, l, d_model) -> (b, l, d_model).

        Args:
            inference_params: an `InferenceParams`. At offset 0 the sequence is read and the states after it are kept;
                later calls continue from them, with any number of tokens.
            T: VideoMamba's number of frames, which changes nothing there either.
        """
        if hidden_states.dim() != 3:
            shape = tuple(hidden_states.shape)
            raise ValueError(f"hidden_states has shape {shape}, expected (b, l, d_model); pass x[None] for one row")
        states = None
        if inference_params is not None:
            self._require_one_direction("inference_params")
            states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            self._require_rows(hidden_states.shape[0], states, inference_params.seqlen_offset == 0)
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *states)[0]
        if states is None and not LAYER and fused_layer.on_gpu(hidden_states):
            found = fused_layer.run(self, None, self, hidden_states)
            if found is not None:
                return self._scaled(found[0])
        xz = project(self.in_proj, hidden_states)  # (b, l, 2 d)
        if LAYER and states is None and (out := self._by_inner_function(xz)) is not None:
            return self._scaled(out)
        return self._scaled(project(self.out_proj, self._mixed(xz, states)))

    def _scaled(self, out: Tensor) -> Tensor:
        return out if self.init_layer_scale is None else out * self.gamma

    def fusion_setting(self) -> tuple:
        return (self.bimamba_type, bool(LAYER))

    def can_fuse_whole(self, packed: bool = False) -> bool:
        """Whether the layer reads in one direction, and nothing in it is replaced, hooked or quantised."""
        projections = untouched(self.in_proj, nn.Linear) and untouched(self.out_proj, nn.Linear)
        return self.bimamba_type == "none" and projections and Direction(self).can_fuse()

    def _by_inner_function(self, xz: Tensor) -> Tensor | None:
        """What is in the place of ``mamba_inner_fn``, where upstream would call it; (b, l, h) or None."""
        function = LAYER.get("mamba_inner_fn")
        taken_away = LAYER.get("causal_conv1d_fn", function) is None
        if function is None or taken_away or not self.use_fast_path or self.bimamba_type != "none":
            return None
        D, bias = (t.to(parameter_dtype(t.dtype)) for t in (self.D, self.dt_proj.bias))
        x_proj: Any = self.x_proj
        return function(
            xz.transpose(1, 2).contiguous(), self.conv1d.weight, self.conv1d.bias, x_proj.weight,
            self.dt_proj.weight, self.out_proj.weight, self.out_proj.bias, decay(self.A_log), None, None, D,
            delta_bias=bias, delta_softplus=True,
        )  # fmt: skip

    def _mixed(self, xz: Tensor, states: tuple[Tensor, Tensor] | None) -> Tensor:
        """All directions' sum, (b, l, d)."""
        kind = self.bimamba_type
        if kind == "none":
            return Direction(self)(xz, states)
        if kind == "v1":
            return Direction(self).both_ways(xz, self.A_b_log)
        y = Direction(self)(xz) + Direction(self, "_b")(xz.flip(1)).flip(1)
        if kind == "v3":
            length, slices = xz.shape[1], self.nslices
            require(
                length % slices == 0,
                f"bimamba_type 'v3' reads {slices} slices (nslices), into which a length of {length} does not divide",
            )
            interleaved = xz.unflatten(1, (slices, -1)).transpose(1, 2).flatten(1, 2)
            sliced = Direction(self, "_s")(interleaved)
            y = y + sliced.unflatten(1, (-1, slices)).transpose(1, 2).flatten(1, 2)
        return y / 2 if self.if_divide_out else y

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Continue from the states, which are updated in place, with one token or several.

        Args:
            hidden_states: (b, l, d_model). conv_state: (b, d, k). ssm_state: (b, d, n).

        Returns:
            The output (b, l, d_model), and both states.
        """
        self._require_one_direction("step")
        length = hidden_states.shape[1]
        if LAYER and length > 1:  # functions by upstream's names take one token
            outputs = [self.step(token, conv_state, ssm_state)[0] for token in hidden_states.split(1, 1)]
            return torch.cat(outputs, 1), conv_state, ssm_state
        x, z = project(self.in_proj, hidden_states).chunk(2, -1)
        direction = Direction(self)
        conv = direction.conv
        update = LAYER.get("causal_conv1d_update", causal_conv1d_update)
        if update is not None and direction.can_convolve():
            tokens = x[:, 0] if length == 1 else x.transpose(1, 2)
            x = update(tokens, conv_state, conv.weight.squeeze(1), conv.bias, self.activation)
            x = x[:, None] if length == 1 else x.transpose(1, 2)
        else:
            width = conv.kernel_size[0] if isinstance(conv, nn.Conv1d) else 0
            require(
                width == 0 or (is_causal(conv, width - 1) and width <= self.d_conv),
                f"step: conv1d is {conv}, which needs more than the {self.d_conv} inputs that a state holds, or later "
                "ones; call the layer on all tokens",
            )
            before = conv_state[..., 1:].to(x.dtype).transpose(1, 2)
            window = torch.cat([before, x], 1)  # (b, k - 1 + l, d)
            conv_state.copy_(torch.cat([conv_state.to(x.dtype), x.transpose(1, 2)], -1)[..., -conv_state.shape[-1] :])
            x = direction.convolved(window)[:, before.shape[1] :]
        u, delta, B, C, bias = direction.selected(x)
        A = decay(self.A_log)
        if length == 1:
            step = LAYER.get("selective_state_update") or selective_state_update
            token = (u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], self.D)
            y = step(ssm_state, *token, z=z[:, 0], dt_bias=bias, dt_softplus=True)[:, None]
        else:
            y, last = selective_scan(u, delta, A, B, C, self.D, z, bias, True, initial_state=ssm_state.clone())
            ssm_state.copy_(last)
        return self._scaled(project(self.out_proj, y)), conv_state, ssm_state

    def _require_one_direction(self, what: str) -> None:
        require(
            self.bimamba_type == "none",
            f"{what}: a layer of bimamba_type {self.bimamba_type!r} reads the whole sequence, also backwards, and has "
            "no step; use bimamba_type 'none', or call the layer on all tokens",
        )

    def _require_rows(self, b: int, states: tuple[Tensor, Tensor], at_start: bool) -> None:
        """One row may start the states of many, which then go on from it."""
        rows = states[0].shape[0]
        require(
            b == rows or (at_start and b == 1),
            f"inference_params has the states of {rows} rows for layer {self.layer_idx}, and hidden_states has {b}; "
            "for another batch use a new InferenceParams, or inference_params.reset(max_seqlen, batch)",
        )

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Zero states, whose size does not depend on lengths.

        Returns:
            (b, d, k) in ``dtype`` or the weights', and (b, d, n) in float32 whatever the dtype (float64 in float64).
            Upstream keeps the second in half, too, and rounds it at every token.
        """
        device = self.out_proj.weight.device
        dtype = self.conv1d.weight.dtype if dtype is None else dtype
        return (
            torch.zeros((batch_size, self.d_inner, self.d_conv), device=device, dtype=dtype),
            torch.zeros((batch_size, self.d_inner, self.d_state), device=device, dtype=parameter_dtype(dtype)),
        )

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        require(
            self.layer_idx is not None, "a layer with inference_params needs a layer_idx; give it one at its making"
        )
        kept = inference_params.key_value_memory_dict
        if self.layer_idx not in kept:
            kept[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        elif initialize_states:
            for state in kept[self.layer_idx]:
                state.zero_()
        return kept[self.layer_idx]
