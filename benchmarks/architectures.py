"""Every Triton and CUDA C++ kernel compiled for each architecture, as its own code would launch it there. Needs no GPU.

    python benchmarks/architectures.py --json docs/benchmarks/DATE-architectures.json
    python benchmarks/architectures.py --capabilities 86 120 --cases "drafts of 8 slots" norm

For each kernel and compute capability: the launches that were compiled, at the 1.4b model's shapes, and the most shared
memory that one of them has, which must be within the card's. It says nothing of results or speed. --json keeps what is
in the file already of other capabilities and, with --cases, of kernels that these do not launch; CUDA C++ is compiled
without --cases, or by --cases without names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from benchmarks.kernel_cases import (
    CARDS,
    PACKAGE,
    SHAPES,
    TRITON_CASES,
    Card,
    compile_only,
    cuda_kernels,
    triton_kernels,
    weights_of,
)  # fmt: skip
from mambakit.ops._backends import nvrtc
from mambakit.ops.decode import persistent_plan
from mambakit.ops.fused_mixer import padding, parameters
from mambakit.ops.selective_scan import cuda_launch
from mambakit.ops.selective_scan.plan import PLAIN, backward_plan, forward_plan

DTYPES = (torch.bfloat16,)  # tests/ops/test_machine_code.py compiles the others, and more variants


def persistent(card: Card, shape: str, format: str | None, rows: int, verify: bool = False) -> Any:
    """The plan of a decode step in one kernel on this card, or why there is none."""
    h, layers = SHAPES[shape]
    weights = weights_of(h, layers, 50280, torch.bfloat16, "cpu", format, fill=False)
    limits = card.processors, card.shared
    return persistent_plan.plan_of(weights, rows, torch.bfloat16, limits, verify=verify)


def compile_cuda(capability: int) -> dict[str, tuple[int, int]]:
    """By kernel: (launches compiled, the most bytes of shared memory)."""
    card, arch, found = CARDS[capability], f"sm_{capability}", dict.fromkeys(cuda_kernels(), (0, 0))

    def note(names: list[str], shared: int) -> None:
        for name in names:
            count, most = found[name]
            found[name] = count + 1, max(most, shared)

    scan = PACKAGE / "ops" / "selective_scan"
    for dtype in DTYPES:
        shape = (16, 2048, 4096)
        forward = forward_plan(*shape, 16, card.processors)
        backward = backward_plan(*shape, 16, card.processors, card.shared)
        for plan, macros, shared in (
            (forward, forward.forward_macros, forward.forward_bytes(dtype.itemsize, True, False)),
            (backward, backward.backward_macros, backward.backward_bytes),
        ):
            nvrtc.machine_code(scan, "kernel.cu", dict(macros(dtype, True, True, True, 8, PLAIN)), arch)
            file = "forward.cuh" if plan is forward else "backward.cuh"
            names = [name for name in found if name.startswith(f"ops/selective_scan/{file}")]
            note([*names, "ops/selective_scan/common.cuh:selective_scan_sequences"], shared)
    for shape, format, rows, verify in (
        ("1.4b", None, 1, False), ("130m", None, 8, False), ("1.4b", None, 5, True), ("130m", "int8", 4, False),
        ("130m", "int4", 1, False), ("130m", "fp8", 4, False),
    ):  # fmt: skip
        plan = persistent(card, shape, format, rows, verify)
        if not isinstance(plan, str):
            nvrtc.machine_code(PACKAGE / "ops" / "decode", "persistent.cu", plan.macros, arch)
            note(["ops/decode/persistent.cu:decode_step"], plan.shared_bytes)
    for kind in parameters._DTYPES.values():
        nvrtc.machine_code(PACKAGE / "ops" / "fused_mixer", "parameters.cu", {"DTYPE": kind}, arch)
        note([name for name in found if name.startswith("ops/fused_mixer/parameters.cu")], 0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        nvrtc.machine_code(PACKAGE / "ops" / "fused_mixer", "padding.cu", padding.macros(dtype, 3), arch)
        note([name for name in found if name.startswith("ops/fused_mixer/padding.cu")], 0)
    assert scan == cuda_launch._FOLDER
    return found


def compile_triton(capability: int, cases: list[str]) -> dict[str, tuple[int, int]]:
    """As `compile_cuda`."""
    found = dict.fromkeys(triton_kernels(), (0, 0))
    for case in cases:
        began = time.perf_counter()
        with compile_only(capability) as compiled:
            TRITON_CASES[case]("cpu", False)
        for one in compiled:
            count, most = found[one.kernel]
            found[one.kernel] = count + 1, max(most, one.shared)
        print(f"  {case}: {len(compiled)} launches, {time.perf_counter() - began:.0f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", nargs="+", type=int, choices=CARDS, default=list(CARDS))
    parser.add_argument("--cases", nargs="*", choices=TRITON_CASES, help="default: all; none: CUDA C++ alone")
    record.add_argument(parser)
    options = parser.parse_args()
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    if options.json is not None and options.json.exists():
        earlier = json.loads(options.json.read_text(encoding="utf-8"))["results"]["architectures"]
        rows = {(row["kernel"], row["capability"]): row for row in earlier}
    there = {*triton_kernels(), *cuda_kernels()}
    rows = {key: row for key, row in rows.items() if key[0] in there}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MAMBAKIT_CACHE"] = os.environ["TRITON_CACHE_DIR"] = folder  # compiled, not read
        for capability in options.capabilities:
            card = CARDS[capability]
            print(f"sm_{capability} ({card.name}, {card.shared:,} bytes)", flush=True)
            found = compile_triton(capability, list(TRITON_CASES) if options.cases is None else options.cases)
            if not options.cases:
                found |= compile_cuda(capability)
            for name, (count, shared) in found.items():
                assert shared <= card.shared, f"{name} takes {shared:,} bytes of the {card.shared:,} of {card.name}"
                if count or options.cases is None or (name, capability) not in rows:
                    row = {"kernel": name, "capability": capability, "launches": count, "shared": shared}
                    rows[name, capability] = row
            order = [*triton_kernels(), *cuda_kernels()]
            ordered = sorted(rows.values(), key=lambda row: (row["capability"], order.index(row["kernel"])))
            notes = "The cases of the command; other kernels by earlier calls." if options.cases is not None else None
            record.write(options.json, {"architectures": ordered}, gpus=0, notes=notes)
    missing = [row for row in rows.values() if not row["launches"]]
    for row in missing:
        print(f"not compiled for sm_{row['capability']}: {row['kernel']}")


if __name__ == "__main__":
    main()
