"""What lies between a Mamba layer's projections as one op: convolution, selection and scan, with a gradient of its
own."""

from mambakit.ops.fused_mixer.api import MixerWeights, fused_mixer
from mambakit.ops.fused_mixer.layer import fused_layer, mix_rows
from mambakit.ops.fused_mixer.signature import LayerWeights

__all__ = ["LayerWeights", "MixerWeights", "fused_layer", "fused_mixer", "mix_rows"]
