"""Numerics: tensors and numbers in, tensors out. This package imports torch and nothing else of mambakit.

An op is a folder:

    api.py        the public function: the contract, the checks, the one entry
    reference.py  a float64 loop that reads like the paper; the oracle of the tests
    chunked.py    plain PyTorch for any device and any tensor; it serves where no kernel does
    schema.py     the torch.library definition: schema, fake, autograd, and who implements it on which device
    cpu.py        the launcher of the CPU implementation: outputs, strides, addresses
    cuda*.py      CUDA C++ (kernels in .cu and .cuh beside it), compiled at run time by NVRTC
    triton*.py    Triton kernels; both are imported at the first CUDA call
    native.cpp    the CPU implementation, built when the package is

Dimension glossary, used in every comment and docstring of the project:

    b  batch                h  hidden size (d_model)     k  convolution width
    l  length               d  inner channels (expand*h) v  vocabulary
    s  packed sequences     n  state size                r  time-step rank
    g  groups of channels of B and C

Layout at every public boundary is channels last: ``(b, l, d)``; transposed views of ``(b, d, l)`` memory are read and
written in place (`mambakit/ops/_layout.py`).
"""

from mambakit.ops.causal_conv1d.api import causal_conv1d, causal_conv1d_
from mambakit.ops.linear_cross_entropy.api import linear_cross_entropy
from mambakit.ops.rms_norm.api import rms_norm
from mambakit.ops.selection_norm.api import selection_norm
from mambakit.ops.selective_scan.api import selective_scan, selective_scan_

__all__ = [
    "causal_conv1d", "causal_conv1d_", "linear_cross_entropy", "rms_norm", "selection_norm", "selective_scan",
    "selective_scan_",
]  # fmt: skip
