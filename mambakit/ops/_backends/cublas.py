"""cuBLAS as torch uses it: the functions of the library that torch is linked with, and torch's handle.

A product through torch costs the host some 25 microseconds, of which cuBLAS's own call is a few. A `LaunchList` makes
that call itself, with the arguments that torch gives.
"""

from __future__ import annotations

import ctypes
import functools
import os

import torch

# cudaDataType, and the algorithm that torch asks for: of half dtypes CUBLAS_GEMM_DEFAULT_TENSOR_OP, which would let
# float32 be rounded to half, so of that CUBLAS_GEMM_DEFAULT.
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
ALGORITHMS = {torch.float32: -1, torch.float16: 99, torch.bfloat16: 99}
_DISALLOW_REDUCED_PRECISION_REDUCTION = 16  # of cublasMath_t
_MOST = 2**31 - 1  # sizes and strides are 32 bits


@functools.cache
def functions() -> tuple[int, int] | None:
    """Addresses of cublasGemmEx and cublasSetMathMode, or None where torch's library is not found.

    On Linux they are looked up in torch's own library, which searches what that is linked with: another cuBLAS in the
    process would not know torch's handle.
    """
    major = (torch.version.cuda or "").partition(".")[0]
    name = f"cublas64_{major}.dll" if os.name == "nt" else "libtorch_cuda.so"
    try:
        library = ctypes.CDLL(name) if os.name == "nt" else ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        product, mode = library.cublasGemmEx, library.cublasSetMathMode
    except (OSError, AttributeError):
        return None
    return tuple(ctypes.cast(f, ctypes.c_void_p).value for f in (product, mode))  # type: ignore[return-value]


def handle() -> int:
    """Torch's handle for this thread and the current device, on the current stream, with torch's workspace. Its math
    mode is the one for float32: TF32 where torch may use it."""
    return torch._C._cuda_getCurrentBlasHandle()


def math_mode(dtype: torch.dtype) -> int:
    """cublasMath_t of products of ``dtype``; -1: as the handle has it."""
    if dtype == torch.float32:
        return -1
    allowed: object = (
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction()
        if dtype == torch.float16
        else torch._C._get_cublas_allow_bf16_reduced_precision_reduction()
    )
    # Newer releases also say whether a sum may be split.
    return 0 if allowed is True or allowed == (True, True) else _DISALLOW_REDUCED_PRECISION_REDUCTION


def row_major(
    a: tuple[tuple[int, ...], tuple[int, ...]], b: tuple[tuple[int, ...], tuple[int, ...]], out: tuple[int, int]
) -> list[int] | None:
    """cublasGemmEx's operations and sizes for out = a @ b, where cuBLAS counts by columns: it computes out.T = b.T @
    a.T. Its first operand is b.

    Args:
        a, b: shapes (m, k) and (k, n), and strides, of which one is 1.
        out: n, and elements from a row of ``out`` to the next.

    Returns:
        op_b, op_a, n, m, k and the leading dimensions of b, a and out; None where a number does not fit into 32 bits.
    """
    (m, k), _ = a
    n, row = out
    operations, leading = [], []
    for (rows, columns), (down, right) in (b, a):
        transposed = right != 1 and columns > 1
        assert not transposed or down == 1 or rows == 1
        operations.append(int(transposed))
        leading.append(max(right, rows, 1) if transposed else max(down, columns, 1))
    found = [*operations, n, m, k, *leading, max(row, n, 1)]
    return found if max(found) <= _MOST else None
