"""`Mamba` of mamba_ssm, and of Vim, VideoMamba and SegMamba where it reads a sequence in several directions."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.compat.convolution import causal_conv1d_update
from mambakit.compat.forms import parameter_dtype, require
from mambakit.compat.mamba_start import initial_a_log, initial_d, start_steps
from mambakit.compat.state_update import selective_state_update
from mambakit.modules.interception import untouched
from mambakit.modules.mixers import fused_layer
from mambakit.modules.projection import project
from mambakit.ops import causal_conv1d, selective_scan
from mambakit.ops._backends.memory import all_plain, transformed
from mambakit.ops.fused_mixer import MixerWeights, mix_rows

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
        if_divide_out: the mean of both directions in place of their sum.
        init_layer_scale: a learned factor (d_model,) of the output that starts at this value.
    """

    mixer_rms_eps: float | None = None
    """There are no norms of dt, B and C."""
    # What a layer has that was pickled whole by mamba_ssm itself.
    bimamba_type, if_divide_out, init_layer_scale, nslices = "none", False, None, 5

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
        self.bimamba_type, self.if_divide_out, self.nslices = bimamba_type, if_divide_out, nslices
        self.init_layer_scale = init_layer_scale
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model, device=device))
        d, n = self.d_inner, d_state
        self.activation, self.act = "silu", nn.SiLU()
        self.in_proj = nn.Linear(d_model, 2 * d, bias=bias, **factory)
        self._add_selection("", conv_bias, factory)
        start_steps(self._submodules("")[2], dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
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
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *states)[0]
        if states is None and fused_layer.on_gpu(hidden_states):
            found = fused_layer.run(self, None, self, hidden_states)
            if found is not None:
                return self._scaled(found[0])
        xz = project(self.in_proj, hidden_states)  # (b, l, 2 d)
        return self._scaled(project(self.out_proj, self._mixed(xz, states)))

    def _scaled(self, out: Tensor) -> Tensor:
        return out if self.init_layer_scale is None else out * self.gamma

    def fusion_setting(self) -> tuple:
        return (self.bimamba_type,)

    def can_fuse_whole(self) -> bool:
        """Whether the layer reads in one direction, and nothing in it is replaced or hooked."""
        projections = untouched(self.in_proj, nn.Linear) and untouched(self.out_proj, nn.Linear)
        return self.bimamba_type == "none" and projections and self._can_fuse("")

    def _mixed(self, xz: Tensor, states: tuple[Tensor, Tensor] | None) -> Tensor:
        """All directions' sum, (b, l, d)."""
        kind = self.bimamba_type
        if kind == "none":
            return self._direction("", xz, states)
        if kind == "v1":
            return self._both_ways(xz)
        y = self._direction("", xz) + self._direction("_b", xz.flip(1)).flip(1)
        if kind == "v3":
            length, slices = xz.shape[1], self.nslices
            require(
                length % slices == 0,
                f"bimamba_type 'v3' reads {slices} slices (nslices), into which a length of {length} does not divide",
            )
            interleaved = xz.unflatten(1, (slices, -1)).transpose(1, 2).flatten(1, 2)
            sliced = self._direction("_s", interleaved)
            y = y + sliced.unflatten(1, (-1, slices)).transpose(1, 2).flatten(1, 2)
        return y / 2 if self.if_divide_out else y

    def _both_ways(self, xz: Tensor) -> Tensor:
        """Vim's first form: the same selection, scanned forwards and backwards, with an A for each."""
        x, z = xz.chunk(2, -1)
        operands, bias = self._selected("", self._convolved("", x))
        u, delta, B, C = operands
        forwards, _ = self._scan(u, delta, self.A_log, B, C, self.D, z, bias)
        u, delta, B, C, z = (t.flip(1) for t in (u, delta, B, C, z))
        backwards, _ = self._scan(u, delta, self.A_b_log, B, C, self.D, z, bias)
        return forwards + backwards.flip(1)

    def _direction(self, suffix: str, xz: Tensor, states: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Convolution, selection, scan and gate with the parameters of one direction: (b, l, 2 d) -> (b, l, d)."""
        if states is None and self._can_fuse(suffix):
            return mix_rows(xz, self._weights(suffix, xz))
        x, z = xz.chunk(2, -1)
        operands, bias = self._selected(suffix, self._convolved(suffix, x))
        u, delta, B, C = operands
        y, last = self._scan(u, delta, getattr(self, f"A{suffix}_log"), B, C, getattr(self, f"D{suffix}"), z, bias)
        if states is not None:
            conv_state, ssm_state = states
            k, length = conv_state.shape[-1], x.shape[1]
            conv_state.copy_(F.pad(x.transpose(1, 2), (k - length, 0)))  # the last k inputs, after zeros
            ssm_state.copy_(last)
        return y

    def _can_fuse(self, suffix: str) -> bool:
        """Whether what lies between the projections may run as one op: nothing is replaced, hooked or traced."""
        conv, x_proj, dt_proj = self._submodules(suffix)
        return (
            untouched(conv, nn.Conv1d) and untouched(x_proj, nn.Linear) and untouched(dt_proj, nn.Linear)
            and dt_proj.bias is not None and x_proj.bias is None and not transformed()
            and all_plain((conv.weight, conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias))
        )  # fmt: skip

    def _submodules(self, suffix: str) -> tuple[Any, Any, Any]:
        return getattr(self, f"conv1d{suffix}"), getattr(self, f"x_proj{suffix}"), getattr(self, f"dt_proj{suffix}")

    def _weights(self, suffix: str, xz: Tensor) -> MixerWeights:
        conv, x_proj, dt_proj = self._submodules(suffix)
        dtype = parameter_dtype(xz.dtype)
        A_log, D = (getattr(self, name).to(dtype) for name in (f"A{suffix}_log", f"D{suffix}"))
        return MixerWeights(
            conv.weight.squeeze(1), conv.bias, x_proj.weight, dt_proj.weight, A_log, D, dt_proj.bias.to(dtype)
        )

    def _convolved(self, suffix: str, x: Tensor) -> Tensor:
        """(b, l, d)"""
        conv = getattr(self, f"conv1d{suffix}")
        if untouched(conv, nn.Conv1d):
            return causal_conv1d(x, conv.weight.squeeze(1), conv.bias, "silu")[0]
        return self.act(conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)

    def _selected(self, suffix: str, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None]:
        """The scan's u, delta, B, C, and the bias that it adds to delta: none where dt_proj's call has added it."""
        _, x_proj, dt_proj = self._submodules(suffix)
        n = self.d_state
        dt, B, C = x_proj(x).split([self.dt_rank, n, n], -1)
        if untouched(dt_proj, nn.Linear):
            return (x, F.linear(dt, dt_proj.weight), B, C), dt_proj.bias
        return (x, dt_proj(dt), B, C), None

    @staticmethod
    def _scan(u, delta, A_log, B, C, D, z, bias) -> tuple[Tensor, Tensor]:
        return selective_scan(u, delta, _decay(A_log), B, C, D, z, bias, True)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Continue from the states, which are updated in place, with one token or several.

        Args:
            hidden_states: (b, l, d_model). conv_state: (b, d, k). ssm_state: (b, d, n).

        Returns:
            The output (b, l, d_model), and both states.
        """
        self._require_one_direction("step")
        x, z = project(self.in_proj, hidden_states).chunk(2, -1)
        conv, _, _ = self._submodules("")
        if untouched(conv, nn.Conv1d):
            x = causal_conv1d_update(
                x.transpose(1, 2), conv_state, conv.weight.squeeze(1), conv.bias, self.activation
            ).transpose(1, 2)
        else:
            before = conv_state[..., 1:].to(x.dtype).transpose(1, 2)
            window = torch.cat([before, x], 1)  # (b, k - 1 + l, d)
            conv_state.copy_(torch.cat([conv_state.to(x.dtype), x.transpose(1, 2)], -1)[..., -conv_state.shape[-1] :])
            x = self._convolved("", window)[:, before.shape[1] :]
        operands, bias = self._selected("", x)
        u, delta, B, C = operands
        A = _decay(self.A_log)
        if hidden_states.shape[1] == 1:
            y = selective_state_update(
                ssm_state, u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], self.D, z[:, 0], bias, True
            )[:, None]
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

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Zero states, whose size does not depend on lengths.

        Returns:
            (b, d, k) in ``dtype`` or the weights', and (b, d, n) in float32 whatever the dtype (float64 in float64).
            Upstream keeps the second in half, too, and rounds it at every token.
        """
        device, conv = self.out_proj.weight.device, self._submodules("")[0]
        dtype = conv.weight.dtype if dtype is None else dtype
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


def _decay(A_log: Tensor) -> Tensor:
    """A in float32 (float64) whatever the parameter was cast to."""
    return -torch.exp(A_log.to(parameter_dtype(A_log.dtype)))
