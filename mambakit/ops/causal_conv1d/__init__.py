"""The short causal depthwise convolution in front of the scan."""
