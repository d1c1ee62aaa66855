"""Model FLOP/s utilisation (MFU): the share of the device's peak that a run uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Dense peak of matrix products in FLOP/s from the vendors' data sheets: bfloat16 and float32 (TF32 where there is).
PEAKS = (
    ("H200", 989e12, 495e12),
    ("H100 PCIe", 756e12, 378e12),
    ("H100", 989e12, 495e12),
    ("B200", 2250e12, 1125e12),
    ("A100", 312e12, 156e12),
    ("L40S", 362e12, 183e12),
    ("L4", 121e12, 60e12),
    ("A10G", 70e12, 35e12),
    ("A10", 125e12, 62.5e12),
    ("RTX 4090", 165e12, 83e12),
    ("RTX 3090", 71e12, 36e12),
)
# delta A, exp, times h, delta B u (2), the sum, and C h (2) for each of the n states of a channel.
_SCAN_OPERATIONS = 8


def flops_per_token(model: Any) -> float:
    """Floating-point operations of a training step for each token: forward, and twice that backward.

    Two for each weight of a linear layer or the head and for each tap of a convolution, and the scan's; what activation
    checkpointing computes again is not counted (model FLOPs, as PaLM's appendix B has it: arXiv 2204.02311).
    """
    config = model.config
    linear = sum(m.weight.numel() for m in model.backbone.modules() if isinstance(m, nn.Linear))
    head = model.get_output_embeddings().weight.numel()
    d, layers = config.intermediate_size, config.num_hidden_layers
    scan = layers * d * (2 * config.conv_kernel + _SCAN_OPERATIONS * config.state_size)
    return 3.0 * (2 * (linear + head) + scan)


def peak_flops(device: torch.device, autocast: str) -> float | None:
    """The device's peak in FLOP/s; None where it is not known (any CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, half, single in PEAKS:
        if known in name:
            return half if autocast == "bfloat16" else single
    return None
