"""The CUDA C++ kernels compiled by NVRTC for every architecture they are meant for.

Needs no GPU, and says nothing of what they compute.
"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from mambakit.decoding.graph_step import gpu_weights
from mambakit.ops._backends import nvrtc
from mambakit.ops.decode import persistent_plan
from mambakit.ops.selective_scan import cuda_launch
from mambakit.ops.selective_scan.plan import PLAIN, Variant, backward_plan, forward_plan
from tests.ops.decode.with_norms import with_norms

# Where the dev extra brings NVRTC it has to be found, so that these tests do not stay away unnoticed.
pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64") or torch.version.hip is not None,
    reason="NVRTC is for Linux on x86-64 and NVIDIA GPUs",
)
# Ampere, Ada, Hopper and Blackwell: multiprocessors and shared bytes of a block.
CARDS = {
    "sm_80": (108, 163 * 1024),
    "sm_86": (84, 99 * 1024),
    "sm_89": (128, 99 * 1024),
    "sm_90": (132, 227 * 1024),
    "sm_100": (148, 227 * 1024),
    "sm_120": (170, 99 * 1024),
}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def compile_only(monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBAKIT_CACHE", str(tmp_path))


def compile_scan(
    kind: str,
    arch: str,
    n: int,
    *,
    aligned=8,
    packed=False,
    dtype=BF16,
    gated=True,
    shape=(16, 2048, 1536),
    chained=False,
    variant=PLAIN,
):
    multiprocessors, shared = CARDS[arch]
    plan = (
        forward_plan(*shape, n, multiprocessors)
        if kind == "forward"
        else backward_plan(*shape, n, multiprocessors, shared)
    )
    assert plan.resident or not chained
    taken = plan.forward_bytes(dtype.itemsize, gated, variant.transposed) if kind == "forward" else plan.backward_bytes
    assert taken <= shared
    macros = plan.forward_macros if kind == "forward" else plan.backward_macros
    compiled_with = dict(macros(dtype, gated, True, packed, aligned, variant))
    return nvrtc.machine_code(cuda_launch._FOLDER, "kernel.cu", compiled_with, arch)


@pytest.mark.parametrize("arch", CARDS)
@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_the_scan(kind, n, arch):
    assert compile_scan(kind, arch, n)


@pytest.mark.parametrize(
    ("n", "options"),
    [
        (1, {"aligned": 0, "packed": True, "dtype": F32, "gated": False}),
        (8, {"aligned": 4, "dtype": F16}),
        (16, {"aligned": 4, "packed": True, "dtype": F32}),
        (16, {"shape": (4, 4096, 5120), "chained": True}),
        (200, {"packed": True}),
        (16, {"variant": Variant(True, 0, 15)}),
        (4, {"variant": Variant(True, 1, 8), "aligned": 0}),
        (1, {"variant": Variant(False, 3, 0), "dtype": F32}),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_the_scans_variants(kind, n, options):
    assert compile_scan(kind, "sm_90", n, **options)


@pytest.mark.parametrize("arch", CARDS)
@pytest.mark.parametrize("kind", ["plain", "int8", "int4", "fp8", "falcon", "jamba"])
def test_the_decode_step(kind, arch):
    norms = {"falcon": {"mixer_rms_eps": 1e-6}, "jamba": {"mixer_rms_eps": 1e-6, "mixer_norm_weights": True}}
    shape = {"vocab_size": 512, "hidden_size": 768, "num_hidden_layers": 1}
    model = with_norms(shape | norms.get(kind, {})).to(BF16)
    if kind in ("int8", "int4", "fp8"):
        model.quantize(kind)
    plan = persistent_plan.plan_of(gpu_weights(model), 1, BF16, CARDS[arch])
    assert not isinstance(plan, str), plan
    assert nvrtc.machine_code(Path(persistent_plan.__file__).parent, "persistent.cu", plan.macros, arch)
