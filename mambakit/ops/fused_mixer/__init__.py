"""What lies between a Mamba layer's projections as one op: convolution, selection and scan, with a gradient of its
own."""

from mambakit.ops.fused_mixer.api import MixerWeights, fused_mixer

__all__ = ["MixerWeights", "fused_mixer"]
