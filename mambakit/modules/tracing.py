"""Whether a call is being traced or captured: it must then not depend on the values of its tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def values_are_hidden(*tensors: Any) -> bool:
    """Whether values must not be read, or cannot be.

    That is so in torch.compile, torch.export, torch.jit.trace, make_fx and the capture of a CUDA graph, and for fake
    and meta tensors. Arguments that are not tensors are ignored.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    for tensor in tensors:
        if isinstance(tensor, Tensor) and (tensor.is_meta or isinstance(tensor, FakeTensor)):
            return True
        if isinstance(tensor, Tensor) and tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
