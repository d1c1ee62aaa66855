"""Time Mamba layers and models that run eagerly on one NVIDIA GPU: small layers, bound by the host.

    python benchmarks/eager.py                           # the tables below
    python benchmarks/eager.py --paths prepared drop-in mamba-ssm --parts mixers
    python benchmarks/eager.py --paths prepared --parts compile     # torch.compile beside eager and captured: minutes
    python benchmarks/eager.py --profile                 # and where the host's time goes
    python benchmarks/eager.py --json out.json
    python benchmarks/eager.py --tiny                    # on a CPU, without meaning: that all of it runs

Training: float32 parameters, bfloat16 autocast, forward and backward, gradients set to None before each. `ms` is wall
time, host included, of calls that follow each other without synchronisation; in brackets `card_ms`, a replay of the
same calls from a CUDA graph, and `one_thread_ms`, wall time where autograd runs the backward pass in the calling thread
(torch.autograd.set_multithreading_enabled(False)). Inference: bfloat16 weights, no autocast, no gradient. `compile`:
whole models by torch.compile in two modes, beside the same eagerly and captured in one CUDA graph.

Each path runs in a process of its own:
    ordinary   mambakit, each op through torch's dispatcher
    prepared   mambakit's default: whole layers, a pass as one list of launches
    drop-in    mambakit's classes of mamba_ssm's interface (`mambakit.compat`)
    mamba-ssm  what is installed of it, measured in the same run; left out where it is not installed
A path whose gradients are wrong (beside float64 on the CPU) is not timed; mamba-ssm, whose model is checked in the same
way, is timed all the same, and what is wrong is printed. A part that takes longer than --limit ends, and keeps what it
has measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from benchmarks.eager_layers import (
    FULL,
    OURS,
    TINY,
    Sizes,
    captured,
    check,
    inference_call,
    mixer_step,
    model_step,
    one_thread,
    use_path,
    wall,
)  # fmt: skip
from benchmarks.eager_profile import profile

PATHS = ("ordinary", "prepared", "drop-in", "mamba-ssm")
PARTS = ("mixers", "models", "inference", "compile")
MODES = ("eager", "default", "reduce-overhead", "captured")
Row = dict[str, object]


class OutOfTimeError(BaseException):
    """A part has used up its time. No Exception: torch.compile would take it for a failure of its own."""


@contextlib.contextmanager
def limited(part: str, seconds: float) -> Iterator[None]:
    """End a part after so many seconds, with a line that says so."""

    def stop(*_: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except OutOfTimeError:
        print(f"{part}: ended after {seconds:g} s (--limit)", flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_path(path: str, arguments: argparse.Namespace, sizes: Sizes) -> None:
    """Measure, and write results as they come."""
    results: dict[str, list[Row]] = {part: [] for part in arguments.parts}

    def keep() -> None:
        arguments.results.write_text(json.dumps(results), encoding="utf-8")

    use_path(path)
    check(path, sizes)
    torch.manual_seed(0)
    steps: list[tuple[Row, Callable[[], object]]] = []
    for part in ("mixers", "models"):
        if part in results:
            with limited(part, arguments.limit):
                training(part, path, sizes, results[part], steps, keep)
    if "inference" in results and path in OURS:
        with limited("inference", arguments.limit), torch.no_grad():
            for case in sizes.inference:
                row = named(path, case)
                row["ms"] = wall(inference_call(path, sizes, *case), sizes.seconds)
                results["inference"].append(row)
                keep()
    if arguments.profile:
        profile(path, sizes)
    # Last: a peer that cannot be captured loses the card's times alone.
    if sizes.device == "cuda":
        with limited("card's times", arguments.limit):
            for row, step in steps:
                row["card_ms"] = captured(step)
                keep()
    if "compile" in results and path in OURS:
        with limited("compile", arguments.limit):
            compiled(path, sizes, results["compile"], keep)


def training(
    part: str, path: str, sizes: Sizes, rows: list[Row], steps: list[tuple[Row, Callable[[], object]]],
    keep: Callable[[], None],
) -> None:  # fmt: skip
    for case in sizes.mixers if part == "mixers" else sizes.models:
        step = mixer_step(path, sizes, *case) if part == "mixers" else model_step(path, sizes, *case)
        row = named(path, case)
        row["ms"], row["one_thread_ms"] = wall(step, sizes.seconds), one_thread(step, sizes.seconds)
        rows.append(row)
        steps.append((row, step))
        keep()


def named(path: str, case: tuple[int, ...]) -> Row:
    names = ("h", "b", "l") if len(case) == 3 else ("h", "layers", "b", "l")
    return {"path": path, **dict(zip(names, case, strict=True))}


def compiled(path: str, sizes: Sizes, rows: list[Row], keep: Callable[[], None]) -> None:
    """Steps of whole models, eagerly, by torch.compile, and captured as `mambakit train` captures them."""
    for case in sizes.compiled:
        for mode in MODES:
            row = named(path, case) | {"mode": mode}
            begin = time.perf_counter()
            if mode in ("eager", "captured"):
                step = model_step(path, sizes, *case)
            else:
                torch._dynamo.reset()
                step = model_step(path, sizes, *case, mode=mode)
            step()
            row["first_call_s"] = time.perf_counter() - begin
            if mode == "captured":
                if sizes.device != "cuda":
                    continue
                row["ms"] = captured(step)
            else:
                row["ms"] = wall(step, sizes.seconds)
            rows.append(row)
            keep()


def missing(path: str) -> str | None:
    if path != "mamba-ssm":
        return None
    absent = [name for name in ("mamba_ssm", "selective_scan_cuda") if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def run_in_process(path: str, options: list[str]) -> tuple[bool, dict[str, list[Row]]]:
    """Whether it ended well, and what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, __file__, "--paths", path, "--results", str(file), *options]
        code = subprocess.run(command).returncode
        if code:
            print(f"{path}: failed with code {code}", flush=True)
        return code == 0, json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def show(results: dict[str, list[Row]], paths: list[str]) -> None:
    """A table of each part; the last columns are mamba-ssm's time over ours."""
    for part, rows in results.items():
        if not rows:
            continue
        if part == "compile":
            show_compiled(rows)
            continue
        names = [name for name in ("h", "layers", "b", "l") if name in rows[0]]
        there = [path for path in paths if any(row["path"] == path for row in rows)]
        ours = [path for path in there if path != "mamba-ssm"] if "mamba-ssm" in there else []
        print(f"\n{part}: ms, host included (card alone, and with autograd in the calling thread)")
        heads = [*(f"{path:>26}" for path in there), *(f"{'mamba-ssm / ' + path:>22}" for path in ours)]
        print("  " + " ".join(f"{name:>7}" for name in names) + "  " + " ".join(heads))
        for case in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
            each = {row["path"]: row for row in rows if tuple(row[name] for name in names) == case}
            cells = [cell(each.get(path)).rjust(26) for path in there]
            cells += [ratio(each.get("mamba-ssm"), each.get(path)).rjust(22) for path in ours]
            print("  " + " ".join(f"{value:>7}" for value in case) + "  " + " ".join(cells), flush=True)


def cell(row: Row | None) -> str:
    if row is None:
        return "-"
    more = [f"{row[key]:.3f}" for key in ("card_ms", "one_thread_ms") if key in row]
    return f"{row['ms']:.3f}" + (f" ({', '.join(more)})" if more else "")


def ratio(over: Row | None, under: Row | None) -> str:
    return "-" if over is None or under is None else f"{over['ms'] / under['ms']:.2f}"  # type: ignore[operator]


def show_compiled(rows: list[Row]) -> None:
    print("\ncompile: ms of a step; default over eager (goal: at most 1), reduce-overhead over captured (at most 1.1)")
    names = ("h", "layers", "b", "l")
    heads = [*names, *MODES, "default/eager", "reduced/captured"]
    print(f"  {'path':>9} " + " ".join(f"{head:>16}" for head in heads))
    for case in dict.fromkeys((row["path"], *(row[name] for name in names)) for row in rows):
        each = {row["mode"]: row for row in rows if (row["path"], *(row[name] for name in names)) == case}
        cells = [cell(each.get(mode)) for mode in MODES]
        cells += [
            ratio(each.get("default"), each.get("eager")),
            ratio(each.get("reduce-overhead"), each.get("captured")),
        ]
        print(f"  {case[0]:>9} " + " ".join(f"{value:>16}" for value in (*case[1:], *cells)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[:3]), help="default: all but compile")
    parser.add_argument("--profile", action="store_true", help="and the host's time, by cProfile and torch's profiler")
    parser.add_argument(
        "--limit", type=float, default=120, metavar="SECONDS", help="of a part of a path (default: 120)"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU: a test of this script")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    record.add_argument(parser)
    arguments = parser.parse_args()
    sizes = TINY if arguments.tiny else FULL
    if arguments.results is not None:
        run_path(*arguments.paths, arguments, sizes)
        return
    if not arguments.tiny:
        print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    options = [f"--{name}" for name in ("profile", "tiny") if getattr(arguments, name)]
    options += ["--parts", *arguments.parts, "--limit", str(arguments.limit)]
    results: dict[str, list[Row]] = {}
    failed = []
    for path in arguments.paths:
        if (why := missing(path)) is not None:
            print(f"{path}: {why}", flush=True)
            continue
        begin = time.perf_counter()
        ended, found = run_in_process(path, options)
        print(f"{path}: {time.perf_counter() - begin:.0f} s", flush=True)
        if not ended:
            failed.append(path)
        for part, rows in found.items():
            results.setdefault(part, []).extend(rows)
        # Each time: a later path may not end.
        record.write(arguments.json, results, gpus=0 if arguments.tiny else 1)
    show(results, arguments.paths)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
