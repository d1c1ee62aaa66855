"""Time Mamba layers and models that run eagerly on one NVIDIA GPU: small layers, bound by the host.

    python benchmarks/eager.py                           # the tables below
    python benchmarks/eager.py --paths prepared          # mambakit's default alone
    python benchmarks/eager.py --parts mixers models     # less of the tables
    python benchmarks/eager.py --profile                 # and where the host's time goes
    python benchmarks/eager.py --compile                 # and torch.compile, and the captured step of `mambakit train`
    python benchmarks/eager.py --json out.json

Training: float32 parameters, bfloat16 autocast, forward and backward, gradients set to None before each. `ms` is wall
time, host included, of calls that follow each other without synchronisation; in brackets `card_ms`, a replay of the
same calls from a CUDA graph, and `one_thread_ms`, wall time where autograd runs the backward pass in the calling thread
(torch.autograd.set_multithreading_enabled(False)). Inference: bfloat16 weights, no autocast, no gradient.

Each path runs in a process of its own:
    ordinary   mambakit, each op through torch's dispatcher
    prepared   mambakit's default: whole layers as one function over launches that are prepared once for a shape
    drop-in    mambakit's classes of mamba_ssm's interface (`mambakit.compat`)
    mamba-ssm  what is installed of it, measured in the same run; left out where it is not installed
A path whose gradients are wrong (beside float64 on the CPU) is not timed; mamba-ssm, whose model is checked in the same
way, is timed all the same, and what is wrong is printed.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.util
import json
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record

PATHS = ("ordinary", "prepared", "drop-in", "mamba-ssm")
PARTS = ("mixers", "models", "inference")
MIXERS = [(192, 64, 197), (96, 8, 4096), (768, 1, 512), (768, 4, 2048)]  # h, b, l
MODELS = [(192, 24, 64, 197), (768, 24, 1, 512), (768, 24, 4, 2048)]  # h, layers, b, l
INFERENCE = [(768, 24, 128, 32), (768, 24, 8, 1)]  # h, layers, b, l; one token continues a state
VOCABULARY = 1024


def wall(call: Callable[[], object], seconds: float = 0.6) -> float:
    """Median milliseconds of a call, over runs of calls between synchronisations."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = max(2, min(20, int(0.05 / (time.perf_counter() - begin))))
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        begin = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / count * 1e3)
    return statistics.median(times)


def one_thread(call: Callable[[], object]) -> float:
    with torch.autograd.set_multithreading_enabled(False):
        return wall(call, 0.3)


def captured(call: Callable[[], object]) -> float:
    """Median milliseconds of a replay from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(25):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def training_step(module: Any, inputs: torch.Tensor, output: Callable[[Any], torch.Tensor]) -> Callable[[], object]:
    dy = None

    def step() -> None:
        nonlocal dy
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            y = output(module(inputs))
        if dy is None:
            dy = torch.randn_like(y)
        y.backward(dy)

    parameters = list(module.parameters())
    return step


def our_mixer(h: int) -> Any:
    import mambakit

    return mambakit.MambaMixer(mambakit.MambaConfig(hidden_size=h, num_hidden_layers=1)).cuda()


def our_model(h: int, layers: int, dtype: torch.dtype = torch.float32) -> Any:
    import mambakit

    config = mambakit.MambaConfig(hidden_size=h, num_hidden_layers=layers, vocab_size=VOCABULARY)
    return mambakit.MambaModel(config).to("cuda", dtype)


def peers_mixer(path: str, h: int) -> Any:
    if path == "drop-in":
        from mambakit.compat.mamba import Mamba
    else:
        from mamba_ssm.modules.mamba_simple import Mamba
    return Mamba(h).cuda()


def peers_model(path: str, h: int, layers: int, vocabulary: int = VOCABULARY) -> Any:
    if path == "drop-in":
        from mambakit.compat.mixer_model import MixerModel
    else:
        from mamba_ssm.models.mixer_seq_simple import MixerModel
    return MixerModel(
        h, layers, d_intermediate=0, vocab_size=vocabulary, rms_norm=True, residual_in_fp32=True, fused_add_norm=True
    ).cuda()


def use_path(path: str) -> None:
    """Make mambakit take this path in this process."""
    if path == "ordinary":
        from mambakit.modules.mixers import fused_layer, mamba
        from mambakit.ops.fused_mixer import fused_mixer

        fused_layer.run = lambda *arguments, **named: None
        mamba.mix_rows = lambda xz, weights, eps=None: fused_mixer(xz, weights, mixer_eps=eps)[0]


def check(path: str) -> None:
    """Gradients of a small model beside float64 on the CPU, in float32 and under autocast."""
    from mambakit.ops.fused_mixer import layer

    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 300))
    dy = torch.randn(2, 300, 64, dtype=torch.float64)
    model, exact, output = small_models(path)
    (output(exact(ids)) * dy).sum().backward()
    wanted = {name: p.grad for name, p in exact.named_parameters()}
    for half, limit in ((False, 1e-4), (True, 0.1)):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            y = output(model(ids.cuda()))
        (y * dy.cuda()).sum().backward()
        for name, p in model.named_parameters():
            error = ((p.grad.cpu() - wanted[name]).norm() / wanted[name].norm()).item()
            if error > limit and path == "mamba-ssm":
                print(f"{path}: the gradient of {name} is {error:.1e} off (bfloat16: {half})", flush=True)
            elif error > limit:
                raise SystemExit(f"{path}: the gradient of {name} is {error:.1e} off (bfloat16: {half}): not timed")
    plans = [plan for plan in layer._plans.values() if plan is not None]
    if (path in ("prepared", "drop-in")) != bool(plans):
        raise SystemExit(f"{path}: {len(plans)} plans were made: {list(layer._plans)}")


def small_models(path: str) -> tuple[Any, Any, Callable[[Any], torch.Tensor]]:
    """A path's model on the GPU, mambakit's own of the same weights in float64 on the CPU, and how to read outputs."""
    import mambakit
    from mambakit.compat.mixer_model import MixerModel

    if path in ("ordinary", "prepared"):
        config = mambakit.MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2)
        exact, model = mambakit.MambaModel(config), mambakit.MambaModel(config).cuda()
        output = lambda y: y.last_hidden_state  # noqa: E731
    else:
        exact = MixerModel(64, 2, vocab_size=64, rms_norm=True, residual_in_fp32=True, fused_add_norm=True)
        model = peers_model(path, 64, 2, 64)
        output = lambda y: y  # noqa: E731
    model.load_state_dict(exact.state_dict())
    return model.train(), exact.double().train(), output


def run_path(path: str, arguments: argparse.Namespace) -> None:
    """Measure, and write results as they come: a peer that cannot be captured loses the card's times alone."""

    def keep() -> None:
        arguments.results.write_text(json.dumps(results), encoding="utf-8")

    ours = path in ("ordinary", "prepared")
    use_path(path)
    check(path)
    results: dict[str, list[dict]] = {part: [] for part in arguments.parts}
    steps = []
    torch.manual_seed(0)
    for h, b, length in MIXERS if "mixers" in results else []:
        step = mixer_step(path, h, b, length)
        row = {"h": h, "b": b, "l": length, "path": path, "ms": wall(step), "one_thread_ms": one_thread(step)}
        results["mixers"].append(row)
        steps.append((results["mixers"][-1], step))
        keep()
    for h, layers, b, length in MODELS if "models" in results else []:
        step = model_step(path, h, layers, b, length)
        row = {"h": h, "layers": layers, "b": b, "l": length, "path": path, "ms": wall(step)}
        results["models"].append(row | {"one_thread_ms": one_thread(step)})
        steps.append((results["models"][-1], step))
        keep()
    for h, layers, b, length in INFERENCE if ours and "inference" in results else []:
        model = our_model(h, layers, torch.bfloat16).eval()
        ids = torch.randint(0, VOCABULARY, (b, length), device="cuda")
        with torch.no_grad():
            cache = model(ids).cache if length == 1 else None
            row = {"h": h, "layers": layers, "b": b, "l": length, "path": path}
            row["ms"] = wall(lambda model=model, ids=ids, cache=cache: model(ids, cache_params=cache, use_cache=True))
        results["inference"].append(row)
        keep()
    if arguments.profile:
        profile(ours, path)
    for row, step in steps:
        row["card_ms"] = captured(step)
        keep()
    if arguments.compile and ours:
        results["compiled"] = compiled(path)
        keep()


def mixer_step(path: str, h: int, b: int, length: int) -> Callable[[], object]:
    mixer = our_mixer(h) if path in ("ordinary", "prepared") else peers_mixer(path, h)
    return training_step(mixer, torch.randn(b, length, h, device="cuda", requires_grad=True), lambda y: y)


def model_step(path: str, h: int, layers: int, b: int, length: int) -> Callable[[], object]:
    ours = path in ("ordinary", "prepared")
    model = our_model(h, layers) if ours else peers_model(path, h, layers)
    ids = torch.randint(0, VOCABULARY, (b, length), device="cuda")
    return training_step(model.train(), ids, (lambda y: y.last_hidden_state) if ours else (lambda y: y))


def compiled(path: str) -> list[dict]:
    """torch.compile of whole models, and the captured step of `mambakit train` without its optimiser."""
    rows = []
    for h, layers, b, length in MODELS[:2]:
        for mode in ("default", "reduce-overhead"):
            torch._dynamo.reset()
            model = our_model(h, layers).train()
            ids = torch.randint(0, VOCABULARY, (b, length), device="cuda")
            begin = time.perf_counter()
            step = training_step(torch.compile(model, mode=mode), ids, lambda y: y.last_hidden_state)
            step()
            seconds = time.perf_counter() - begin
            row = {"h": h, "layers": layers, "b": b, "l": length, "path": path, "mode": mode, "ms": wall(step)}
            rows.append(row | {"first_call_s": seconds})
    return rows


def profile(ours: bool, path: str) -> None:
    """Where the host's time goes: Python's functions, and torch's calls."""
    h, b, length = MIXERS[2]
    profile_step(f"{path}: mixer {h}, {b} x {length}", mixer_step(path, h, b, length))
    h, layers, b, length = MODELS[1]
    profile_step(f"{path}: model {h} x {layers}, {b} x {length}", model_step(path, h, layers, b, length))
    if ours:
        h, layers, b, length = INFERENCE[0]
        model = our_model(h, layers, torch.bfloat16).eval()
        ids = torch.randint(0, VOCABULARY, (b, length), device="cuda")
        with torch.no_grad():
            profile_step(f"{path}: prefill {h} x {layers}, {b} x {length}", lambda: model(ids, use_cache=True))


def profile_step(name: str, step: Callable[[], object], count: int = 20, most: int = 30) -> None:
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    enqueued = time.perf_counter() - begin
    torch.cuda.synchronize()
    total = time.perf_counter() - begin
    with torch.autograd.set_multithreading_enabled(False):
        begin = time.perf_counter()
        for _ in range(count):
            step()
        alone = (time.perf_counter() - begin) / count * 1e3
        torch.cuda.synchronize()
    enqueued, total = enqueued / count * 1e3, total / count * 1e3
    print(f"\n{name}: ms until the host returns {enqueued:.3f} (one thread {alone:.3f}), until all is done {total:.3f}")
    # One thread: the backward pass too, whose thread cProfile would not see.
    with torch.autograd.set_multithreading_enabled(False):
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(count):
            step()
        profiler.disable()
    torch.cuda.synchronize()
    stats = pstats.Stats(profiler)
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:most]  # type: ignore[attr-defined]
    print("  calls and microseconds of a step, the functions' own time (cProfile's cost included)")
    for (file, line, function), (_, calls, own, cumulative, _) in rows:
        where = "" if file == "~" else f"{'/'.join(Path(file).parts[-3:])}:{line} "
        print(
            f"  {calls / count:7.1f} {own / count * 1e6:9.1f} {cumulative / count * 1e6:9.1f}  {where}{function[:70]}"
        )
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    averages = profiled.key_averages()
    print("  torch's calls: count, own host microseconds, card microseconds")
    for event in sorted(averages, key=lambda e: -(e.self_cpu_time_total + e.self_device_time_total))[:most]:
        print(
            f"  {event.count / 3:7.1f} {event.self_cpu_time_total / 3:9.1f} {event.self_device_time_total / 3:9.1f}"
            f"  {event.key[:90]}"
        )


def missing(path: str) -> str | None:
    if path != "mamba-ssm":
        return None
    absent = [name for name in ("mamba_ssm", "selective_scan_cuda") if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def run_in_process(path: str, options: list[str]) -> tuple[bool, dict[str, list[dict]]]:
    """Whether it ended well, and what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, __file__, "--paths", path, "--results", str(file), *options]
        code = subprocess.run(command).returncode
        if code:
            print(f"{path}: failed with code {code}", flush=True)
        return code == 0, json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def show(results: dict[str, list[dict]], paths: list[str]) -> None:
    for part, rows in results.items():
        names = [name for name in ("h", "layers", "b", "l", "mode") if rows and name in rows[0]]
        print(f"\n{part}: ms, host included (card alone, and with autograd in the calling thread)")
        print("  " + " ".join(f"{name:>7}" for name in names) + "  " + " ".join(f"{path:>26}" for path in paths))
        for case in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
            cells, best = [], {}
            for path in paths:
                found = [row for row in rows if row["path"] == path and tuple(row[name] for name in names) == case]
                if not found:
                    cells.append(f"{'-':>26}")
                    continue
                best[path] = found[0]["ms"]
                more = [f"{found[0][key]:.3f}" for key in ("card_ms", "one_thread_ms") if key in found[0]]
                beside = f" ({', '.join(more)})" if more else ""
                cells.append(f"{found[0]['ms']:.3f}{beside}".rjust(26))
            peer = best.get("mamba-ssm")
            ratio = f"  mamba-ssm / prepared {peer / best['prepared']:.2f}" if peer and "prepared" in best else ""
            print("  " + " ".join(f"{value:>7}" for value in case) + "  " + " ".join(cells) + ratio, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--profile", action="store_true", help="and the host's time, by cProfile and torch's profiler")
    parser.add_argument("--compile", action="store_true", help="and torch.compile in two modes; takes minutes")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    record.add_argument(parser)
    arguments = parser.parse_args()
    if arguments.results is not None:
        run_path(*arguments.paths, arguments)
        return
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    options = [f"--{name}" for name in ("profile", "compile") if getattr(arguments, name)]
    options += ["--parts", *arguments.parts]
    results: dict[str, list[dict]] = {}
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
        record.write(arguments.json, results, gpus=1)  # each time: a later path may not end
    show(results, arguments.paths)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
