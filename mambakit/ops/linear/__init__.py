"""Linear layers with weight-only quantisation, and matrix-vector products for decoding on a CPU."""

from mambakit.ops.linear.api import PackedWeight, linear, pack

__all__ = ["PackedWeight", "linear", "pack"]
