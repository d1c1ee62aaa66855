"""Whether a call is recorded to run again: it must then not depend on the values that its tensors happen to have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def values_are_hidden(*tensors: Any) -> bool:
    """Whether values must not be read, or cannot be: in torch.compile, torch.export, torch.jit.trace and make_fx, in the capture of
    a CUDA graph, of fake tensors and on meta. What is no tensor is passed over."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    for tensor in tensors:
        if isinstance(tensor, Tensor) and (tensor.is_meta or isinstance(tensor, FakeTensor)):
            return True
        if isinstance(tensor, Tensor) and tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
