"""The short causal depthwise convolution before the scan."""
