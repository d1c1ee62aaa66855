"""MambaMixer: the selective state space layer (arXiv 2312.00752, figure 3 and algorithm 2)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.errors import RequirementError
from mambakit.modules.convolution import convolve, convolve_
from mambakit.modules.initialization import TimeSteps, initial_a_log
from mambakit.modules.interception import is_filter, untouched
from mambakit.modules.left_padding import LeftPadding
from mambakit.modules.mixers import fused_layer
from mambakit.modules.mixers.mixer import Mixer
from mambakit.modules.mixers.selection import Selection
from mambakit.modules.mixers.time_steps import TimeStepProjection
from mambakit.modules.norm import MixerNorm
from mambakit.modules.packing import Packing
from mambakit.modules.placement import CacheHandle, opened
from mambakit.modules.precision import keep_float32
from mambakit.modules.projection import in_training, project
from mambakit.modules.quantized_linear import QuantizedLinear
from mambakit.modules.state_cache import StateCache
from mambakit.modules.state_spec import StateTensor
from mambakit.ops import causal_conv1d, causal_conv1d_, selection_norm, selective_scan, selective_scan_
from mambakit.ops._backends.memory import all_plain
from mambakit.ops.fused_mixer import MixerWeights, fused_mixer, mix_rows
from mambakit.quoting import brief


class MambaMixer(Mixer):
    """The Mamba layer: state in, state out, and one forward for training, prefill and decode.

    Without a cache it trains. With one, the same code prefills, continues and decodes, for any number of new tokens.

    Args:
        config: a `MambaConfig` (or any object with its fields).
        layer_idx: which layer's states of the cache are this layer's.
    """

    STATE_FIELDS = (
        "intermediate_size", "state_size", "conv_kernel", "time_step_rank", "use_bias", "use_conv_bias", "hidden_act",
    )  # fmt: skip
    COMPUTATION_FIELDS = ("hidden_act", "mixer_rms_eps")

    @staticmethod
    def state_tensors(config: Any, dtype: torch.dtype) -> tuple[StateTensor, ...]:
        """``conv`` (d, k - 1), the convolution's last inputs, in ``dtype``; ``ssm`` (d, n), float32 whatever the
        weights are (float64 in a float64 model), bfloat16 where ``ssm_state_dtype`` asks for it."""
        d, wide = config.intermediate_size, torch.float64 if dtype == torch.float64 else torch.float32
        if getattr(config, "ssm_state_dtype", None) == "bfloat16":
            wide = torch.bfloat16
        return (
            StateTensor("conv", (d, config.conv_kernel - 1), dtype),
            StateTensor("ssm", (d, config.state_size), wide),
        )

    @staticmethod
    def padded_window(config: Any) -> int | None:
        return config.conv_kernel - 1

    def __init__(self, config: Any, layer_idx: int = 0):
        super().__init__()
        h, d, n = config.hidden_size, config.intermediate_size, config.state_size
        self.layer_idx = layer_idx
        self.hidden_size, self.intermediate_size, self.ssm_state_size = h, d, n
        self.conv_kernel_size = config.conv_kernel
        self.time_step_rank = int(config.time_step_rank)
        self.in_proj = nn.Linear(h, 2 * d, bias=config.use_bias)
        # The module holds the weights under their usual names, and the op causal_conv1d runs on them. The module itself
        # is called only where it has a hook, a replaced forward or an adapter (`convolution.py`).
        self.conv1d = nn.Conv1d(d, d, config.conv_kernel, groups=d, bias=config.use_conv_bias)
        self.x_proj = nn.Linear(d, self.time_step_rank + 2 * n, bias=False)
        self.dt_proj = TimeStepProjection(self.time_step_rank, d, bias=True, steps=TimeSteps.of(config))
        self.A_log = nn.Parameter(torch.empty(d, n, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(d, dtype=torch.float32))
        self.out_proj = nn.Linear(d, h, bias=config.use_bias)
        # A model of many layers starts the end of each residual branch smaller
        # (`mambakit.models.mamba.initialization`).
        self.out_proj.__dict__["ends_residual_branch"] = True
        # FalconMamba normalises dt, B and C without weights, Jamba with weights; plain Mamba has no such fields.
        self.mixer_rms_eps: float | None = getattr(config, "mixer_rms_eps", None)
        self.dt_layernorm: MixerNorm | None = None
        self.b_layernorm: MixerNorm | None = None
        self.c_layernorm: MixerNorm | None = None
        if self.mixer_rms_eps is not None and getattr(config, "mixer_norm_weights", False):
            self.dt_layernorm = MixerNorm(self.time_step_rank, self.mixer_rms_eps)
            self.b_layernorm, self.c_layernorm = (MixerNorm(n, self.mixer_rms_eps) for _ in range(2))
        self._set_activation(config.hidden_act)
        # In training: compute the convolution's output and delta again in the backward pass. It takes a mixer that
        # `can_fuse`.
        self.recompute_selection = False
        # Context parallelism puts ops of the same contract in their place, which pass the state between processes.
        self.causal_conv1d, self.selective_scan = causal_conv1d, selective_scan
        self.reset_own_parameters()  # its layers did when they were made

    def initial_values(self) -> dict[str, Tensor]:
        """As mamba_ssm's `Mamba` starts: A = -(1, ..., n) in every channel, D = 1."""
        return {"A_log": initial_a_log(self.A_log), "D": torch.ones_like(self.D)}

    def _set_activation(self, name: str) -> None:
        """SiLU runs inside the convolution; any other activation of transformers' table follows it."""
        if name in ("silu", "swish"):
            self.conv_activation: str | None = "silu"
            self.act: Callable | None = None
            return
        if importlib.util.find_spec("transformers") is None:
            raise RequirementError(
                f'hidden_act is {brief(name)}, which is transformers\' to compute: pip install "mambakit[hf]", or '
                'choose "silu", Mamba\'s own'
            )
        from transformers.activations import ACT2FN

        if name not in ACT2FN:
            raise ValueError(f"hidden_act {brief(name)} is not known; choose one of {sorted(ACT2FN)}")
        self.conv_activation, self.act = None, ACT2FN[name]

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: StateCache | CacheHandle | None = None,
        packing: Packing | LeftPadding | None = None,
    ) -> Tensor:
        """Mix over time.

        Args:
            hidden_states: (b, l, h), or the packed row (1, total, h) with ``packing``.
            cache_params: read as the state before the first token and left as the state after the last.
            packing: where the sequences of a packed row start, and their slots; or, in inference with a cache, the
                padding on the left of each row.

        Returns:
            (b, l, h).
        """
        cache = opened(cache_params, self.layer_idx, hidden_states.device)
        if not isinstance(packing, Packing) and fused_layer.on_gpu(hidden_states):
            found = fused_layer.run(self, None, self, hidden_states, cache=cache, padding=packing)
            if found is not None:
                return found[0]
        return self.after_in_proj(project(self.in_proj, hidden_states), cache, packing)

    def after_in_proj(self, xz: Tensor, cache: StateCache | None, packing: Packing | LeftPadding | None) -> Tensor:
        """`forward` from in_proj's output xz (b, l, 2 d) on, for a block that computes its norm and in_proj as one."""
        if isinstance(packing, LeftPadding):
            return self._after_in_proj_padded(xz, cache, packing)
        if packing is not None:
            packing = packing.on(xz.device)
        if in_training() and self.can_fuse():
            return project(self.out_proj, self._mix_fused(xz, cache, packing))
        x, z = xz.chunk(2, -1)
        if cache is not None and not torch.is_grad_enabled() and (packing is None or packing.in_place):
            y = self._mix_in_place(x, z, cache, packing)
        else:
            y = self._mix(x, z, cache, packing)
        return project(self.out_proj, y)

    def _after_in_proj_padded(self, xz: Tensor, cache: StateCache | None, padding: LeftPadding) -> Tensor:
        """Inference: as `after_in_proj`, and padding on the left changes no state."""
        assert cache is not None
        x, z = xz.chunk(2, -1)
        window, ssm_state = cache.memory(self.layer_idx)
        x, before = padding.move(x, window)
        x, after = self._convolve(x, before, None)
        window.copy_(after)
        u, delta, *rest = self._scan_inputs(x, z)
        y, _ = selective_scan_(u, padding.without_steps(delta), *rest, state=ssm_state)
        return project(self.out_proj, y.to(z.dtype))

    def can_fuse(self) -> bool:
        """Whether what lies between the projections may run as one op, `mambakit.ops.fused_mixer`."""
        return self._can_fuse((nn.Linear,)) and (torch.compiler.is_compiling() or all_plain(self._mixer_weights()))

    def _can_fuse(self, linear: tuple[type[nn.Module], ...]) -> bool:
        """Whether nothing is on what lies between the projections, x_proj being of one of these classes."""
        return (
            type(self) is MambaMixer and self.act is None and self._norms_are_plain()
            and self.dt_proj.bias is not None
            and self.causal_conv1d is causal_conv1d and self.selective_scan is selective_scan
            and untouched(self.x_proj, *linear) and untouched(self.dt_proj, TimeStepProjection)
            and is_filter(self.conv1d, 0)
        )  # fmt: skip

    def fusion_setting(self) -> tuple:
        setting = self.act, self.mixer_rms_eps, self.causal_conv1d, self.selective_scan, self.recompute_selection
        return setting if self.dt_layernorm is None else (*setting, *(norm.eps for norm in self.norms()))

    def norms(self) -> tuple[Any, ...]:
        """The modules of dt's, B's and C's norms; none where they have no weights, or where there are no norms."""
        found = self.dt_layernorm, self.b_layernorm, self.c_layernorm
        return () if found[0] is None else found

    def norm_weights(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(r,), (n,), (n,) of dt's, B's and C's norms; Nones where they have no weights or there are no norms."""
        norms = self.norms()
        return (norms[0].weight, norms[1].weight, norms[2].weight) if norms else (None, None, None)

    def _norms_are_plain(self) -> bool:
        """Whether the norms of dt, B and C run as one op: none of their modules is hooked or replaced."""
        return all(untouched(norm, MixerNorm) and norm.eps == self.mixer_rms_eps for norm in self.norms())

    def can_fuse_whole(self, packed: bool = False) -> bool:
        """Whether the projections, too, may run as one function with it: `mambakit.ops.fused_mixer.layer`; with
        ``packed`` also where layers are quantised."""
        if self.recompute_selection:
            return False
        if packed:
            linear = nn.Linear, QuantizedLinear
            return untouched(self.in_proj, *linear) and untouched(self.out_proj, *linear) and self._can_fuse(linear)
        return untouched(self.in_proj, nn.Linear) and untouched(self.out_proj, nn.Linear) and self.can_fuse()

    def _mixer_weights(self) -> MixerWeights:
        filter, bias, _ = self._filter()
        steps = self.dt_proj
        return MixerWeights(
            filter, bias, self.x_proj.weight, steps.weight, self.A_log, self.D, steps.bias, *self.norm_weights()
        )

    def _mix_fused(self, xz: Tensor, cache: StateCache | None, packing: Packing | None) -> Tensor:
        """As `_mix`, as one op."""
        cu_seqlens = None if packing is None else packing.cu_seqlens
        before = self._states(cache, packing)
        if cache is None and packing is None and not self.recompute_selection:
            return mix_rows(xz, self._mixer_weights(), self.mixer_rms_eps)
        y, *states = fused_mixer(
            xz, self._mixer_weights(), *before, cu_seqlens, self.recompute_selection, self.mixer_rms_eps
        )
        self._keep(cache, packing, *states)
        return y

    def _states(self, cache: StateCache | None, packing: Packing | None) -> tuple[Tensor | None, Tensor | None]:
        if cache is None:
            return None, None
        conv_state, ssm_state = cache.layer(self.layer_idx, None if packing is None else packing.read)
        return conv_state, ssm_state.float() if ssm_state.dtype == torch.bfloat16 else ssm_state

    def _keep(self, cache: StateCache | None, packing: Packing | None, conv_state: Tensor, ssm_state: Tensor) -> None:
        if cache is not None:
            cache.update(self.layer_idx, conv_state, ssm_state, rows=None if packing is None else packing.write)

    def _mix(self, x: Tensor, z: Tensor, cache: StateCache | None, packing: Packing | None) -> Tensor:
        """States go in and come out as values, and gradients flow through them."""
        conv_state, ssm_state = self._states(cache, packing)
        cu_seqlens = None if packing is None else packing.cu_seqlens
        x, conv_state = self._convolve(x, conv_state, cu_seqlens)
        y, ssm_state = self.selective_scan(*self._scan_inputs(x, z), initial_state=ssm_state, cu_seqlens=cu_seqlens)
        self._keep(cache, packing, conv_state, ssm_state)
        return y.to(z.dtype)

    @torch.no_grad()
    def traced(self, hidden_states: Tensor, cache: StateCache) -> tuple[Tensor, Selection]:
        """`forward` without gradients or packing, and what it chose to let in, to keep and to read at each token."""
        x, z = project(self.in_proj, hidden_states).chunk(2, -1)
        conv_state, ssm_state = self._states(cache, None)
        u, conv_state = self._convolve(x, conv_state, None)
        inputs = self._scan_inputs(u, z)
        y, ssm_state = self.selective_scan(*inputs, initial_state=ssm_state)
        self._keep(cache, None, conv_state, ssm_state)
        u, delta, A, B, C, D, _, bias, _ = inputs
        wide = A.dtype
        delta = delta.to(wide) if bias is None else delta.to(wide) + bias
        delta = F.softplus(delta, threshold=40)  # the default, 20, shows in float64
        selection = Selection(u.to(wide), delta, A, B.to(wide), C.to(wide), D)
        return project(self.out_proj, y.to(z.dtype)), selection

    def _mix_in_place(self, x: Tensor, z: Tensor, cache: StateCache, packing: Packing | None) -> Tensor:
        """Inference: the ops read and write the cache's own memory."""
        cu_seqlens = None if packing is None else packing.cu_seqlens
        slots = None if packing is None else packing.read.to(torch.int32)
        conv_state, ssm_state = cache.memory(self.layer_idx)
        if is_filter(self.conv1d, 0):
            x, _ = causal_conv1d_(x, *self._filter(), state=conv_state, slot_indices=slots, cu_seqlens=cu_seqlens)
        else:
            self._require_whole_rows()
            rows = None if packing is None else packing.read
            x = convolve_(self.conv1d, self.conv_kernel_size, x, self.conv_activation, conv_state, rows, cu_seqlens)
        y, _ = selective_scan_(*self._scan_inputs(x, z), state=ssm_state, slot_indices=slots, cu_seqlens=cu_seqlens)
        return y.to(z.dtype)

    def _convolve(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """(the convolution's output, its state after it), out of place."""
        if is_filter(self.conv1d, 0):
            return self.causal_conv1d(x, *self._filter(), initial_state=state, cu_seqlens=cu_seqlens)
        self._require_whole_rows()
        return convolve(self.conv1d, self.conv_kernel_size, x, self.conv_activation, state, cu_seqlens)

    def _filter(self) -> tuple[Tensor, Tensor | None, str | None]:
        """(d, k), (d,) and the activation that runs inside the convolution."""
        return self.conv1d.weight.squeeze(1), self.conv1d.bias, self.conv_activation

    def _require_whole_rows(self) -> None:
        if self.causal_conv1d is not causal_conv1d:
            raise ValueError(
                f"layer {self.layer_idx}: mixer.conv1d has a hook, a forward or an adapter of its own, and the row is "
                "spread over processes, where the convolution runs without the module; take it off, or train without "
                "context parallelism"
            )

    def _scan_inputs(self, x: Tensor, z: Tensor) -> tuple:
        """The selection: delta, B and C from the convolution's output (algorithm 2, lines 2 to 4)."""
        if self.act is not None:
            x = self.act(x)
        dt, B, C = self._selected(x)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        A = -torch.exp(self.A_log.to(dtype))
        delta, bias = self._time_steps(dt)
        if (
            bias is None and delta.dtype.itemsize > x.dtype.itemsize
        ):  # a half would round the sum: the scan reads its dtype
            x, B, C, z = (t.to(delta.dtype) for t in (x, B, C, z))
        return x, delta.to(x.dtype), A, B, C, self.D.to(dtype), z, None if bias is None else bias.to(dtype), True

    def _selected(self, x: Tensor) -> tuple[Tensor, ...]:
        """dt (b, l, r), B and C (b, l, n)."""
        r, n, norms = self.time_step_rank, self.ssm_state_size, self.norms()
        selected = project(self.x_proj, x)
        if self.mixer_rms_eps is None:
            return selected.split([r, n, n], -1)
        if self._norms_are_plain():
            selected = selection_norm(selected, r, self.mixer_rms_eps, *self.norm_weights())
            return selected.split([r, n, n], -1)
        return tuple(norm(t) for norm, t in zip(norms, selected.split([r, n, n], -1), strict=True))

    def _time_steps(self, dt: Tensor) -> tuple[Tensor, Tensor | None]:
        """What goes into the softplus, as the scan takes it: a product, and a bias that it adds in float32.

        A module in dt_proj's place (an adapter around it, a plain linear layer) adds the bias itself. Of a float32 sum
        that is to be a half it is taken off again, and added in the scan.
        """
        if untouched(self.dt_proj, TimeStepProjection):
            return self.dt_proj.product(dt), self.dt_proj.bias
        steps = self.dt_proj(dt)
        if steps.dtype == dt.dtype:
            return steps, None
        own = next((m for m in self.dt_proj.modules() if isinstance(m, TimeStepProjection)), None)
        # On meta: accelerate's hooks brought it for the call alone.
        if own is None or own.bias is None or own.bias.is_meta:
            return steps, None
        return steps - own.bias, own.bias

    def _apply(self, fn: Callable, recurse: bool = True):
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(lambda t: keep_float32(fn, t), recurse=False)  # A_log and D

    def extra_repr(self) -> str:
        return f"h={self.hidden_size}, d={self.intermediate_size}, n={self.ssm_state_size}, layer={self.layer_idx}"
