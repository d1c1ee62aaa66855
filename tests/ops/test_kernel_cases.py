"""Every kernel of the project is launched by a case of `benchmarks/kernel_cases.py`, and was compiled for every card.

`benchmarks/architectures.py` compiles all of them (its record is read here), `.ci/sanitizers.py` runs all of them.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time

import pytest
import torch

from benchmarks.kernel_cases import (
    CARDS,
    CUDA_CASES,
    PACKAGE,
    TRITON_CASES,
    compile_only,
    cuda_kernels,
    triton_functions,
    triton_kernels,
)  # fmt: skip
from benchmarks.record import FOLDER
from benchmarks.tables.records import latest
from tests.ops.interpreter import INTERPRETED


@pytest.fixture
def launched(monkeypatch):
    """The Triton kernels that are launched, by "file:name"; none of them runs."""
    triton = pytest.importorskip("triton")
    found: set[str] = set()

    class Recorder:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: found.add(self.name)

    for name in triton_functions():
        file, function = name.split(":")
        module = importlib.import_module("mambakit." + file.removesuffix(".py").replace("/", "."))
        if isinstance(getattr(module, function), triton.runtime.jit.KernelInterface):
            monkeypatch.setattr(module, function, Recorder(name))
    return found


@pytest.mark.skipif(INTERPRETED, reason="kernels are objects of another class there")
def test_every_triton_kernel_is_launched_by_a_case(launched):
    for case in TRITON_CASES.values():
        case("cpu", True)
    assert launched == set(triton_kernels())


def test_what_is_found_in_the_sources():
    """A kernel is launched by ``name[(grid)](...)``; every other function of Triton is called by one."""
    kernels, functions = triton_kernels(), triton_functions()
    assert len(kernels) >= 38
    assert all(name.startswith("ops/") for name in kernels)
    text = "\n".join(path.read_text(encoding="utf-8") for path in (PACKAGE / "ops").rglob("*.py"))
    for name in set(functions) - set(kernels):
        assert re.search(rf"[\s(=.]{name.split(':')[1]}\(", text), f"{name} is called by nothing"


def test_every_cuda_kernel_is_launched_by_a_case():
    """By name: which kernels a call launches is said beside it."""
    assert {name for _, names in CUDA_CASES.values() for name in names} == set(cuda_kernels())


def test_all_were_compiled_for_every_card():
    """The record of `benchmarks/architectures.py` has every kernel there is, of each architecture that it names; run
    it again where this fails."""
    rows = json.loads((FOLDER / f"{latest('architectures')}.json").read_text())["results"]["architectures"]
    found = {(row["kernel"], row["capability"]): row for row in rows}
    missing = [
        (name, capability)
        for name in [*triton_kernels(), *cuda_kernels()]
        for capability in {row["capability"] for row in rows}
        if (name, capability) not in found
    ]
    assert not missing
    assert {row["capability"] for row in rows} == set(CARDS)
    for row in rows:
        assert row["shared"] <= CARDS[row["capability"]].shared
        refused = "float8" in row["kernel"] and row["capability"] < 89  # fp8 weights, without 8-bit floats
        refused = refused or ("hopper" in row["kernel"] and row["capability"] != 90)
        assert (row["launches"] == 0) == refused, row


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_a_kernel_is_compiled_as_its_code_launches_it(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with compile_only(86) as found:
        TRITON_CASES["norm"]("cpu", True)
    names = [one.kernel for one in found]
    assert names == [f"ops/rms_norm/triton.py:{name}" for name in ("_forward_kernel", "_backward_kernel",
                                                                    "_sum_partials_kernel")]  # fmt: skip
    assert all(0 <= one.shared < CARDS[86].shared for one in found)
    if not torch.cuda.is_available():
        import triton

        assert triton.runtime.driver._active is None, "the driver is Triton's own again"


def sanitizers():
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("sanitizers", PACKAGE.parent / ".ci" / "sanitizers.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0),
        ("========= ERROR SUMMARY: 12 errors", 12),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", 3),
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 1 error", 1),
        ("nothing", 0),
    ],
)
def test_what_a_sanitizer_reported(text, count):
    assert sanitizers().summary_of(text) == count


def test_the_sanitizers_script_knows_every_kernel_and_stops_in_time():
    """A sanitizer that only runs the process: cases fail without a GPU, are named, and nothing counts as covered."""
    module = sanitizers()
    assert set(module.every_kernel()) == {*triton_kernels(), *cuda_kernels()}
    assert set(module.every_case()) == {*TRITON_CASES, *CUDA_CASES}
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: .ci/sanitizers.py runs there")
    found, output = module.run_piece([], ["norm"], 120)
    assert set(found["cases"]) == {"norm"}, output
    assert found["cases"]["norm"], "there is no GPU"
    assert found["launched"] == []
    sleeps = [sys.executable, "-c", "import time; time.sleep(30)"]  # `sleep` itself would refuse the options after it
    slow, output = module.run_piece(sleeps, ["norm"], 1)
    assert slow == {"cases": {}, "launched": []}
    assert "stopped after 1 s" in output


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_sanitizers_script_puts_its_pieces_together(jobs, monkeypatch):
    """Whatever ends first: kernels, failures, reports and pieces that were stopped, of each tool."""
    module = sanitizers()
    kernels, names = module.every_kernel(), [f"case {i}" for i in range(7)]

    def run_piece(command, piece, seconds):
        tool = command[2]
        time.sleep(0.01 * (int(piece[0][-1]) % 3))
        if tool == "memcheck" and "case 5" in piece:
            return {"cases": {}, "launched": []}, "stopped after 1 s"
        cases = {name: "broken" if name == "case 3" else "" for name in piece}
        launched = [kernels[int(name[-1])] for name in piece]
        return {"cases": cases, "launched": launched}, "RACECHECK SUMMARY: 2 hazards" if "case 6" in piece else ""

    saved = []
    monkeypatch.setattr(module, "run_piece", run_piece)
    tools = ["racecheck", "memcheck"]
    race, memory = module.check(tools, "sanitizer", names, time.monotonic() + 60, jobs, saved.append)
    assert saved[-1] == [race, memory]
    assert race["covered"] == sorted(kernels[:7])
    assert race["left"] == sorted(kernels[7:])
    assert (race["cases left"], race["failed"]) == ([], {"case 3": "broken"})
    assert [(one["count"], "case 6" in one["cases"]) for one in race["reported"]] == [(2, True)]
    # With one job pieces are of several cases, and the whole of one is stopped.
    stopped = names[4:7] if jobs == 1 else ["case 5"]
    assert memory["cases left"] == stopped
    assert set(memory["covered"]) == {kernels[int(n[-1])] for n in names if n not in stopped}
    late = module.check(["memcheck"], "sanitizer", names, time.monotonic(), jobs, saved.append)
    assert late[0]["cases left"] == names
