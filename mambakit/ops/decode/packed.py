"""A model's weights as the decode op takes them: by name, and as the flat list of its schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mambakit.ops.linear.packed import PackedWeight
from mambakit.ops.linear.schema import packed_of, parts_of

_PARTS = 5  # tensors of a packed weight in a schema
_LAYER = 4 * _PARTS + 8


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

    def large(self) -> tuple[PackedWeight, ...]:
        return self.in_proj, self.x_proj, self.dt_proj, self.out_proj

    def small(self) -> tuple[Tensor | None, ...]:
        return (
            self.norm, self.in_proj_bias, self.conv, self.conv_bias, self.dt_bias, self.A, self.D, self.out_proj_bias,
        )  # fmt: skip


@dataclass(frozen=True)
class PackedModel:
    """What a step reads of a whole model."""

    layers: list[PackedLayer]
    final_norm: Tensor  # (h,)
    head: PackedWeight  # (v, h)
    eps: float  # of every norm

    def flat(self) -> tuple[list[Tensor | None], list[str], list[int], float]:
        """``weights``, ``formats``, ``groups`` and ``eps`` of `mambakit::decode`."""
        weights: list[Tensor | None] = []
        for layer in self.layers:
            weights += layer.small()
            for weight in layer.large():
                weights += parts_of(weight)
        weights += [self.final_norm, *parts_of(self.head)]
        packed = [*(w for layer in self.layers for w in layer.large()), self.head]
        return weights, [w.format for w in packed], [w.group for w in packed], self.eps

    @classmethod
    def from_flat(
        cls, weights: Sequence[Tensor | None], formats: Sequence[str], groups: Sequence[int], eps: float
    ) -> PackedModel:
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
            norm, in_proj_bias, conv, conv_bias, dt_bias, A, D, out_proj_bias = weights[at : at + 8]
            if norm is None or conv is None or A is None or D is None:
                raise ValueError("decode: a layer without norm, conv, A or D; only biases may be absent")
            (d, n), h = A.shape, norm.shape[0]
            in_proj, x_proj = packed(at + 8, h), packed(at + 8 + _PARTS, d)
            dt_proj = packed(at + 8 + 2 * _PARTS, x_proj.out_features - 2 * n)
            out_proj = packed(at + 8 + 3 * _PARTS, d)
            layers.append(
                PackedLayer(
                    norm,
                    in_proj,
                    in_proj_bias,
                    conv,
                    conv_bias,
                    x_proj,
                    dt_proj,
                    dt_bias,
                    A,
                    D,
                    out_proj,
                    out_proj_bias,
                )
            )
        final_norm = weights[count * _LAYER]
        if final_norm is None:
            raise ValueError("decode: a model without its final norm; only biases may be absent")
        return cls(layers, final_norm, packed(count * _LAYER + 1, final_norm.shape[0]), eps)
