"""Linear layers with weight-only quantisation, and matrix-vector products for decoding on a CPU."""

from mambakit.ops.linear.api import linear, normed_linear
from mambakit.ops.linear.packed import PackedWeight, pack

__all__ = ["PackedWeight", "linear", "normed_linear", "pack"]
