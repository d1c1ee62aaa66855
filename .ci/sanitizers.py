"""compute-sanitizer's racecheck and memcheck over every Triton and CUDA C++ kernel, in pieces, and what was covered.

    python .ci/sanitizers.py                                    # both tools, every case: on a GPU, within ten minutes
    python .ci/sanitizers.py --tools memcheck --minutes 4       # one of them
    python .ci/sanitizers.py --only "drafts of 8 slots" norm    # some cases
    python .ci/sanitizers.py --jobs 6                           # six processes at a time
    python .ci/sanitizers.py --list                             # cases and kernels; needs no GPU

A piece is a few cases of `benchmarks/kernel_cases.py` at small shapes, in a process of its own under one tool. Kernels
are compiled once, before, without a sanitizer. Pieces that take too long are stopped, and counted as not covered. At
the end: for each tool the kernels that ran under it, as the launches themselves report them, what it reported, and what
is left. The exit status is 1 where a tool reported something, a case failed, or a kernel of the project was not
covered.

compute-sanitizer is part of the CUDA toolkit: PATH, --sanitizer, or pip's nvidia-cuda-sanitizer-api package.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TOOLS = {
    "racecheck": ["--tool", "racecheck", "--racecheck-report", "all"],
    # What cuda-bindings asks the driver for and does not get is no error of a kernel.
    "memcheck": ["--tool", "memcheck", "--report-api-errors", "no"],
}
_REPORTED = re.compile(r"(ERROR|WARNING) SUMMARY: (\d+) (?:error|hazard|warning)|RACECHECK SUMMARY: (\d+) hazard", re.I)
_PIECE = 4  # cases of a process


def every_case() -> dict[str, tuple[str, ...]]:
    """By name, the CUDA C++ kernels that a case launches; () of Triton's, which are recorded."""
    from benchmarks.kernel_cases import CUDA_CASES, TRITON_CASES

    return dict.fromkeys(TRITON_CASES, ()) | {name: kernels for name, (_, kernels) in CUDA_CASES.items()}


def every_kernel() -> list[str]:
    from benchmarks.kernel_cases import cuda_kernels, triton_kernels

    return [*triton_kernels(), *cuda_kernels()]


def run_cases(names: list[str], report: Path) -> None:
    """In the process of a piece: run the cases, and write after each which kernels were launched so far."""
    import torch
    from triton.runtime.jit import JITFunction

    from benchmarks.kernel_cases import CUDA_CASES, PACKAGE, TRITON_CASES
    from mambakit.ops._backends import nvrtc

    launched: set[str] = set()
    run, kernel = JITFunction.run, nvrtc.Module.kernel
    by_name = {name.split(":")[1]: name for _, kernels in CUDA_CASES.values() for name in kernels}

    def noted(self, *arguments, warmup, **options):
        if not warmup:
            path = Path(self.fn.__code__.co_filename)
            if path.is_relative_to(PACKAGE):
                launched.add(f"{path.relative_to(PACKAGE)}:{self.fn.__name__}")
        return run(self, *arguments, warmup=warmup, **options)

    def found(self, name, *arguments, **options):
        launched.add(by_name.get(name, name))
        return kernel(self, name, *arguments, **options)

    JITFunction.run, nvrtc.Module.kernel = noted, found
    torch.manual_seed(0)
    done: dict[str, str] = {}
    for name in names:
        case = TRITON_CASES[name] if name in TRITON_CASES else CUDA_CASES[name][0]
        try:
            case("cuda", True)
            torch.cuda.synchronize()
            done[name] = ""
        except Exception as error:  # the other cases are still worth their time
            done[name] = f"{type(error).__name__}: {error}"[:500]
        report.write_text(json.dumps({"cases": done, "launched": sorted(launched)}))


def summary_of(text: str) -> int:
    """The number of errors, hazards and warnings in a sanitizer's output."""
    return sum(int(match[2] or match[3]) for match in _REPORTED.finditer(text))


def run_piece(command: list[str], names: list[str], seconds: float) -> tuple[dict, str]:
    """(what the process wrote, its output). Stopped after ``seconds``."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        whole = [*command, sys.executable, str(Path(__file__)), "--run", *names, "--report", str(report)]
        try:
            done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, seconds))
            output = done.stdout + done.stderr
        except subprocess.TimeoutExpired as stopped:
            output = f"stopped after {seconds:.0f} s\n" + ((stopped.stdout or b"").decode(errors="replace"))
        found = json.loads(report.read_text()) if report.exists() else {"cases": {}, "launched": []}
    return found, output


def find_sanitizer(given: str | None) -> str:
    if (path := given or shutil.which("compute-sanitizer")) is not None:
        return path
    for place in (Path("/usr/local/cuda/bin"), *Path(sys.prefix).rglob("nvidia/cu*/bin")):
        if (place / "compute-sanitizer").exists():
            return str(place / "compute-sanitizer")
    raise SystemExit("compute-sanitizer is not on PATH; install the CUDA toolkit, or give --sanitizer PATH")


class Covered:
    """What is known of one tool."""

    def __init__(self, tool: str, names: list[str]):
        self.tool, self.names = tool, names
        self.covered: set[str] = set()
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self.reported: list[dict] = []

    def add(self, piece: list[str], found: dict, output: str) -> int:
        """Note a piece; the number that the tool reported."""
        count = summary_of(output)
        self.covered |= set(found["launched"])
        self.done |= set(found["cases"])
        self.failed |= {name: error for name, error in found["cases"].items() if error}
        if count:
            self.reported.append({"cases": piece, "count": count, "output": output[-3000:]})
        missing = [name for name in piece if name not in found["cases"]]
        if missing and "stopped after" not in output:
            self.failed |= dict.fromkeys(missing, output[-500:])
        return count

    def found(self) -> dict:
        kernels = every_kernel()
        return {
            "tool": self.tool, "covered": sorted(self.covered & set(kernels)),
            "left": sorted(set(kernels) - self.covered),
            "cases left": [name for name in self.names if name not in self.done], "failed": self.failed,
            "reported": self.reported,
        }  # fmt: skip


def pieces_of(names: list[str], jobs: int) -> list[list[str]]:
    """Cases of one process each; smaller pieces where several run at a time, so that none is long."""
    size = _PIECE if jobs == 1 else 1
    return [names[begin : begin + size] for begin in range(0, len(names), size)]


def check(
    tools: list[str], sanitizer: str, names: list[str], end: float, jobs: int, save: Callable[[list[dict]], None]
) -> list[dict]:
    """Every case under every tool, ``jobs`` pieces at a time, until ``end``. ``save`` gets what is known after each."""
    known = {tool: Covered(tool, names) for tool in tools}
    pieces = pieces_of(names, jobs)
    lock = threading.Lock()

    def run(tool: str, piece: list[str]) -> None:
        # Each tool has its share of the time where one piece runs after the other.
        left = end - time.monotonic()
        if jobs == 1:
            left -= (len(tools) - 1 - tools.index(tool)) * (end - began) / len(tools)
        if left < 5:
            return
        start = time.monotonic()
        found, output = run_piece([sanitizer, *TOOLS[tool]], piece, left)
        with lock:
            count = known[tool].add(piece, found, output)
            print(f"{tool}: {', '.join(piece)}: {count} reported, {time.monotonic() - start:.0f} s", flush=True)
            save([one.found() for one in known.values()])

    began = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        for each in [pool.submit(run, tool, piece) for tool in tools for piece in pieces]:
            each.result()
    return [one.found() for one in known.values()]


def write_record(path: Path | None, results: list[dict]) -> None:
    from benchmarks import record

    rows = [
        {"tool": r["tool"], "kernel": kernel, "covered": kernel in r["covered"]}
        for r in results
        for kernel in every_kernel()
    ]
    reported = [  # the output is printed
        {"tool": r["tool"], "cases": one["cases"], "count": one["count"]} for r in results for one in r["reported"]
    ]
    record.write(path, {"sanitizers": rows, "reported": reported}, gpus=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--only", nargs="+", metavar="CASE")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, each with a case (default: 1)")
    parser.add_argument("--sanitizer", help="path of compute-sanitizer")
    parser.add_argument("--json", type=Path, help="write the record of what was covered here")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_cases(options.run, options.report)
        return 0
    names = options.only or list(every_case())
    if unknown := set(names) - set(every_case()):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; --list shows them")
    if options.list:
        print("\n".join(["cases:", *(f"  {n}" for n in names), "kernels:", *(f"  {k}" for k in every_kernel())]))
        return 0
    sanitizer, began = find_sanitizer(options.sanitizer), time.monotonic()
    end = began + 60 * options.minutes
    # Compiled, and seen to run at all.
    compiled: dict = {"cases": {}}
    with ThreadPoolExecutor(options.jobs) as pool:
        parts = [names[i :: options.jobs] for i in range(min(options.jobs, len(names)))]
        for found, output in pool.map(lambda part: run_piece([], part, end - time.monotonic()), parts):
            compiled["cases"] |= found["cases"]
            if not found["cases"]:
                print(output[-3000:])
                return 1
    if broken := {name: error for name, error in compiled["cases"].items() if error}:
        print("\n".join(f"FAILED without a sanitizer: {name}: {error}" for name, error in broken.items()))
    print(f"compiled and run without a sanitizer in {time.monotonic() - began:.0f} s", flush=True)
    results = check(options.tools, sanitizer, names, end, options.jobs, lambda found: write_record(options.json, found))
    for result in results:
        print(f"\n{result['tool']}: {len(result['covered'])} of {len(every_kernel())} kernels ran under it")
        for name in result["left"]:
            print(f"  not covered: {name}")
        for name, error in result["failed"].items():
            print(f"  FAILED: {name}: {error}")
        for one in result["reported"]:
            print(f"  {one['count']} reported in {', '.join(one['cases'])}:\n{one['output']}")
    clean = all(not (r["reported"] or r["failed"] or (r["left"] and not options.only)) for r in results)
    print("\nnone reported" if clean else "\nsee above")
    return 0 if clean and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
