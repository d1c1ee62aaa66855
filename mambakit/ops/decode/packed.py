"""A model's weights as the decode op takes them: by name, and as the flat list of its schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mambakit.ops.linear.packed import PackedWeight
from mambakit.ops.linear.schema import packed_of, parts_of

_PARTS = 5  # tensors of a packed weight in a schema
_SMALL = 11  # tensors of a layer that are not packed
_LAYER = 4 * _PARTS + _SMALL


@dataclass(frozen=True)
class PackedLayer:
    """What one layer reads. Linear weights are packed; biases may be None."""

    norm: Tensor  # (h,)
    in_proj: PackedWeight  # (2d, h)
    in_proj_bias: Tensor | None
    conv: Tensor  # (d, k), k in 2..8
    conv_bias: Tensor | None
    x_proj: PackedWeight  # (r + 2n, d)
    dt_proj: PackedWeight  # (d, r)
    dt_bias: Tensor | None  # (d,), added before the softplus
    A: Tensor  # (d, n), -exp(A_log)
    D: Tensor  # (d,)
    out_proj: PackedWeight  # (h, d)
    out_proj_bias: Tensor | None
    # Weights of the norms of dt, B and C: (r,), (n,), (n,), all three or none.
    dt_norm: Tensor | None = None
    B_norm: Tensor | None = None
    C_norm: Tensor | None = None

    def norms(self) -> tuple[Tensor | None, ...]:
        return self.dt_norm, self.B_norm, self.C_norm

    def large(self) -> tuple[PackedWeight, ...]:
        return self.in_proj, self.x_proj, self.dt_proj, self.out_proj

    def small(self) -> tuple[Tensor | None, ...]:
        return (
            self.norm, self.in_proj_bias, self.conv, self.conv_bias, self.dt_bias, self.A, self.D, self.out_proj_bias,
            *self.norms(),
        )  # fmt: skip


@dataclass(frozen=True)
class PackedModel:
    """What a step reads of a whole model."""

    layers: list[PackedLayer]
    final_norm: Tensor  # (h,)
    head: PackedWeight  # (v, h)
    eps: float  # of the norms of the residual stream
    mixer_eps: float | None = None  # of the norms of dt, B and C; None: there are none

    def flat(self) -> tuple[list[Tensor | None], list[str], list[int], float, float | None]:
        """``weights``, ``formats``, ``groups``, ``eps`` and ``mixer_eps`` of `mambakit::decode`."""
        weights: list[Tensor | None] = []
        for layer in self.layers:
            weights += layer.small()
            for weight in layer.large():
                weights += parts_of(weight)
        weights += [self.final_norm, *parts_of(self.head)]
        packed = [*(w for layer in self.layers for w in layer.large()), self.head]
        return weights, [w.format for w in packed], [w.group for w in packed], self.eps, self.mixer_eps

    @classmethod
    def from_flat(
        cls, weights: Sequence[Tensor | None], formats: Sequence[str], groups: Sequence[int], eps: float,
        mixer_eps: float | None,
    ) -> PackedModel:  # fmt: skip
        """Back from `flat`.

        Raises:
            ValueError: the lists are not of one model.
        """
        count = len(formats) // 4
        if len(weights) != count * _LAYER + 1 + _PARTS or len(formats) != 4 * count + 1 or len(groups) != len(formats):
            raise ValueError(
                f"decode: {len(weights)} weights, {len(formats)} formats and {len(groups)} groups; a model of L layers "
                f"has {_LAYER} L + {1 + _PARTS} weights, and 4 L + 1 formats and groups (PackedModel.flat)"
            )
        kinds = iter(zip(formats, groups, strict=True))

        def packed(at: int, columns: int) -> PackedWeight:
            format, group = next(kinds)
            data, scales, starts, listed, values = weights[at : at + _PARTS]
            return packed_of(data, scales, starts, listed, values, format, columns, group)

        layers = []
        for at in range(0, count * _LAYER, _LAYER):
            norm, in_proj_bias, conv, conv_bias, dt_bias, A, D, out_proj_bias, *norms = weights[at : at + _SMALL]
            if norm is None or conv is None or A is None or D is None:
                raise ValueError("decode: a layer without norm, conv, A or D; only biases may be absent")
            (d, n), h = A.shape, norm.shape[0]
            at_large = at + _SMALL
            in_proj, x_proj = packed(at_large, h), packed(at_large + _PARTS, d)
            dt_proj = packed(at_large + 2 * _PARTS, x_proj.out_features - 2 * n)
            out_proj = packed(at_large + 3 * _PARTS, d)
            layers.append(
                PackedLayer(
                    norm, in_proj, in_proj_bias, conv, conv_bias, x_proj, dt_proj, dt_bias, A, D, out_proj,
                    out_proj_bias, *norms,
                )
            )  # fmt: skip
        final_norm = weights[count * _LAYER]
        if final_norm is None:
            raise ValueError("decode: a model without its final norm; only biases may be absent")
        return cls(layers, final_norm, packed(count * _LAYER + 1, final_norm.shape[0]), eps, mixer_eps)
