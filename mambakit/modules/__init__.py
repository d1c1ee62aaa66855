"""nn.Module building blocks and the state they carry. Imports mambakit.ops and torch (safetensors to store a state)."""

from mambakit.modules.block import MambaBlock
from mambakit.modules.cache import MambaCache
from mambakit.modules.mixers.mamba import MambaMixer
from mambakit.modules.norm import RMSNorm
from mambakit.modules.packing import Packing

__all__ = ["MambaBlock", "MambaCache", "MambaMixer", "Packing", "RMSNorm"]
