"""``mamba_ssm.utils.torch``: the decorators of autograd functions under CUDA's autocast."""

from __future__ import annotations

import functools

import torch

custom_fwd = functools.partial(torch.amp.custom_fwd, device_type="cuda")
custom_bwd = functools.partial(torch.amp.custom_bwd, device_type="cuda")
