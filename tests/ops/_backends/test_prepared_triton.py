"""Prepared Triton launches beside the parameters that the machine code declares. Triton compiles without a GPU."""

from __future__ import annotations

import ctypes
import os
import re
import struct
import types

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mambakit.ops._backends import nvrtc
from mambakit.ops._backends.prepared_triton import NotPreparedError, PreparedTriton

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are compiled here")
_BYTES = {"u64": 8, "u32": 4, "b32": 4, "f32": 4}


@triton.jit(do_not_specialize=["odd"])
def kernel(x, absent, y, n, odd, one, even, far, eps, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i * one + even, mask=i < n, other=0.0) * eps + odd
    tl.store(y + i + far, value, mask=i < n)


class Card:
    """What Triton and the launches ask of a driver. Of the last kernel: ``sizes`` of its parameters in bytes, as its
    PTX declares them; ``launched`` are the shapes and parameters of launches."""

    def __init__(self, monkeypatch):
        self.sizes: list[int] = []
        self.launched: list[tuple[tuple, list[bytes]]] = []
        utils = types.SimpleNamespace(
            load_binary=lambda name, code, shared, device: (1, 2, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        )
        active = types.SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, utils=utils,
            get_current_stream=lambda device: 0, launcher_cls=self._loaded,
        )  # fmt: skip
        monkeypatch.setattr(type(driver), "active", active, raising=False)
        monkeypatch.setattr(nvrtc, "parameter_sizes", lambda function: self.sizes)
        monkeypatch.setattr(nvrtc, "_launcher", lambda cooperative: self._launch)

    def _loaded(self, source, metadata):
        compiled = next(iter(kernel.device_caches[0][0].values()))
        (entry,) = re.findall(r"\.entry \w+\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
        self.sizes = [_BYTES[kind] for kind in re.findall(r"\.param \.(\w+)", entry)]

    def _launch(self, function, *call):
        *shape, _, parameters, _ = call
        addresses = (ctypes.c_void_p * len(self.sizes)).from_address(parameters)
        self.launched.append(
            (tuple(shape), [ctypes.string_at(a, s) for a, s in zip(addresses, self.sizes, strict=True)])
        )
        return 0


@pytest.fixture
def card(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel.device_caches.clear()
    yield Card(monkeypatch)
    kernel.device_caches.clear()


def arguments():
    return {"x": torch.float32, "absent": None, "y": torch.bfloat16, "n": 100, "odd": 7, "one": 1, "even": 32,
            "far": 2**40, "eps": 0.5}  # fmt: skip


def test_parameters_are_where_the_machine_code_reads_them(card):
    launch = PreparedTriton(kernel, (3, 2), arguments(), {"BLOCK": 128, "num_warps": 2})
    launch(5, 0x1000, 0x2000)
    launch(5, 0x3000, 0x4000)
    (shape, first), (_, second) = card.launched
    assert shape[:6] == (3, 2, 1, 64, 1, 1)
    # `absent` and `one` are constants of the machine code; two pointers to scratch memory end the list.
    assert card.sizes == [8, 8, 4, 4, 4, 8, 4, 8, 8]
    rest = [struct.pack("<i", 100), struct.pack("<i", 7), struct.pack("<i", 32), struct.pack("<q", 2**40)]
    rest += [struct.pack("<f", 0.5), bytes(8), bytes(8)]
    assert first == [struct.pack("<q", 0x1000), struct.pack("<q", 0x2000), *rest]
    assert second == [struct.pack("<q", 0x3000), struct.pack("<q", 0x4000), *rest]


def test_an_unknown_way_of_passing_parameters_is_refused(card, monkeypatch):
    monkeypatch.setattr(nvrtc, "parameter_sizes", lambda function: [*card.sizes, 4])
    with pytest.raises(NotPreparedError, match=r"the kernel's parameters have \[8, .*, 4\] bytes, expected \[8, "):
        PreparedTriton(kernel, (1,), arguments(), {"BLOCK": 128})
    monkeypatch.setattr(nvrtc, "parameter_sizes", lambda function: card.sizes[1:])
    with pytest.raises(NotPreparedError, match="the kernel's parameters have"):
        PreparedTriton(kernel, (1,), arguments(), {"BLOCK": 128})

    def old_driver(function):
        raise RuntimeError("cuFuncGetParamInfo not found")

    monkeypatch.setattr(nvrtc, "parameter_sizes", old_driver)
    with pytest.raises(NotPreparedError, match="the driver does not tell .* not found"):
        PreparedTriton(kernel, (1,), arguments(), {"BLOCK": 128})
