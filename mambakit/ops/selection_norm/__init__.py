"""The RMS norms of dt, B and C within a mixer, side by side as x_proj gives them."""

from mambakit.ops.selection_norm.api import selection_norm

__all__ = ["selection_norm"]
