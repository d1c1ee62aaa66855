"""Layers for models of one's own, in the place of PyTorch's recurrent ones. On torch alone."""

from mambakit.nn.stack import MambaStack

__all__ = ["MambaStack"]
