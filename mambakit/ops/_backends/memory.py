"""Memory that native code reads and writes: how it is made, which tensors a kernel may
read, and the one place that takes an address.

A kernel sees only a tensor's address. So every buffer is made with a dtype and a device (torch's defaults
can be set to anything), and an address is only given away of plain memory: a `torch.Tensor` or `torch.nn.Parameter`
itself, of the dtype, on the device and of the size that the kernel expects. A subclass (torchao's and bitsandbytes'
weights, DTensor, FakeTensor), a sparse, quantised, nested or meta tensor, a functorch wrapper, or a view that is to be
conjugated or negated when read is none.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from mambakit.ops._releases import dispatch_bits

PLAIN_TYPES = (Tensor, nn.Parameter)
FLOAT32 = (torch.float32,)
INT32 = (torch.int32,)
FLOAT32_OR_BFLOAT16 = (torch.float32, torch.bfloat16)
_CPU = torch.device("cpu")
# What torch's dispatcher knows of a plain tensor on a CPU, on a GPU, and on either one in inference mode; anything more
# is special.
_PLAIN_KEYS = dispatch_bits(torch._C._dispatch_keys(torch.empty(0, dtype=torch.float32, device="cpu")))
for _key in ("CUDA", "AutogradCUDA", "AutocastCUDA"):
    _PLAIN_KEYS |= dispatch_bits(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key)))


def empty(*shape: int, dtype: torch.dtype, device: torch.device | str = _CPU) -> Tensor:
    """Contiguous memory for a kernel to fill."""
    return torch.empty(shape, dtype=dtype, device=device)


def zeros(*shape: int, dtype: torch.dtype, device: torch.device | str = _CPU) -> Tensor:
    """Contiguous memory of zeros."""
    return torch.zeros(shape, dtype=dtype, device=device)


def is_plain(tensor: Tensor | None) -> bool:
    """Whether this is plain memory, or None: whether its address says all there is to know of it."""
    if tensor is None:
        return True
    if type(tensor) not in PLAIN_TYPES or dispatch_bits(torch._C._dispatch_keys(tensor)) & ~_PLAIN_KEYS:
        return False
    return tensor.data_ptr() != 0 or tensor.numel() == 0  # sharded training frees the memory of weights between uses


def all_plain(tensors: Iterable[Tensor | None]) -> bool:
    return all(map(is_plain, tensors))


def plain_arguments(arguments: Iterable[object]) -> bool:
    """Whether an op's tensors are plain memory, for an implementation that the dispatcher has chosen by its device.

    Of what is special it passes on subclasses that have memory of their own, and nothing else.
    """
    return all(type(a) in PLAIN_TYPES for a in arguments if isinstance(a, Tensor))


def transformed() -> bool:
    """Whether calls are traced or transformed here: compiled, in a functorch transform, in forward-mode
    differentiation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def in_functorch() -> bool:
    """Whether a transform of torch.func runs (grad, jacrev, vmap, ...).

    A custom op has no rules for them. Its reference needs none: it is plain PyTorch.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Whether calls carry tangents (torch.func.jvp, forward_ad): a custom op has none; its plain PyTorch version
    has."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def observed() -> bool:
    """Whether torch's calls are observed: by a dispatch mode (FakeTensorMode, FlopCounterMode, ...) or a function
    mode.

    A default device is such a mode, and does not count: here every buffer names its own.
    """
    if torch._C._len_torch_dispatch_stack():
        return True
    if not torch._C._len_torch_function_stack():
        return False
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


class PlainMemoryError(TypeError):
    """A tensor whose address a kernel cannot take."""


def address(tensor: Tensor, dtypes: tuple[torch.dtype, ...], count: int, device: int = -1) -> int:
    """Where ``count`` neighbouring elements begin: of a plain tensor, contiguous, of one of ``dtypes``.

    Args:
        device: -1 for the CPU, else the GPU's index.

    Raises:
        PlainMemoryError: any other tensor.
    """
    try:
        if (
            type(tensor) in PLAIN_TYPES
            and tensor.dtype in dtypes
            and tensor.get_device() == device
            and tensor.is_contiguous()
            and tensor.numel() == count
            and not tensor.is_neg()
            and not tensor.is_nested
        ):
            place = tensor.data_ptr()
            if place or not count:
                return place
    except RuntimeError:  # what torch answers where there is no memory: sparse, mkldnn, functorch's
        pass
    raise PlainMemoryError(_refusal(tensor, dtypes, f"{count} contiguous elements", device))


def address_of_rows(tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: int = -1) -> int:
    """As `address`, of a tensor whose last dimension is adjacent in memory; the kernel is told its other strides."""
    try:
        if (
            type(tensor) in PLAIN_TYPES
            and tensor.dtype in dtypes
            and tensor.get_device() == device
            and tensor.shape == shape
            and (tensor.stride(-1) == 1 or shape[-1] <= 1 or not tensor.numel())
            and not tensor.is_neg()
            and not tensor.is_nested
        ):
            place = tensor.data_ptr()
            if place or not tensor.numel():
                return place
    except RuntimeError:
        pass
    raise PlainMemoryError(_refusal(tensor, dtypes, f"shape {tuple(shape)} with adjacent channels", device))


def _refusal(tensor: Tensor, dtypes: tuple[torch.dtype, ...], layout: str, device: int) -> str:
    where = "the CPU" if device < 0 else f"cuda:{device}"
    names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    kind = type(tensor)
    if kind in PLAIN_TYPES and not tensor.is_nested:
        found = f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, {tensor.layout}"
        if tensor.layout is torch.strided:
            found += f" {tensor.stride()}"
        if not is_plain(tensor):
            found += f", {torch._C._dispatch_keys(tensor)}"
    else:
        found = f"a {kind.__module__}.{kind.__qualname__}"
    return (
        f"a native kernel takes plain memory, {names} on {where}, {layout}, and was given {found}; convert it first "
        "(.contiguous(), .to(...)), or call the reference of the op, which is plain PyTorch and takes any tensor"
    )
