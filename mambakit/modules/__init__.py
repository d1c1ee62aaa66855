"""nn.Module building blocks and their state. Imports mambakit.ops, torch, and safetensors to store a state."""

from mambakit.modules.block import MambaBlock
from mambakit.modules.cache import MambaCache, new_cache
from mambakit.modules.layer_config import LayerConfig
from mambakit.modules.mixers.mamba import MambaMixer
from mambakit.modules.norm import MixerNorm, RMSNorm
from mambakit.modules.packing import Packing
from mambakit.modules.state_cache import StateCache
from mambakit.modules.state_spec import StateSpec, StateTensor

__all__ = [
    "LayerConfig",
    "MambaBlock",
    "MambaCache",
    "MambaMixer",
    "MixerNorm",
    "Packing",
    "RMSNorm",
    "StateCache",
    "StateSpec",
    "StateTensor",
    "new_cache",
]
