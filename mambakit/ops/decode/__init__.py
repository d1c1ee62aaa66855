"""One token of each row through a whole model."""

from mambakit.ops.decode.api import decode
from mambakit.ops.decode.packed import PackedLayer, PackedModel

__all__ = ["PackedLayer", "PackedModel", "decode"]
