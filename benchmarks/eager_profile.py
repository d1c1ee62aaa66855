"""Where the host's time of a step goes, for `eager.py --profile`: Python's functions, and torch's calls."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.eager_layers import OURS, Sizes, inference_call, mixer_step, model_step, synchronize


def profile(path: str, sizes: Sizes) -> None:
    h, b, length = sizes.mixers[-2 if len(sizes.mixers) > 1 else 0]
    profile_step(f"{path}: mixer {h}, {b} x {length}", mixer_step(path, sizes, h, b, length))
    h, layers, b, length = sizes.models[1 if len(sizes.models) > 1 else 0]
    profile_step(f"{path}: model {h} x {layers}, {b} x {length}", model_step(path, sizes, h, layers, b, length))
    if path in OURS:
        h, layers, b, length = sizes.inference[0]
        with torch.no_grad():
            name = f"{path}: prefill {h} x {layers}, {b} x {length}"
            profile_step(name, inference_call(path, sizes, h, layers, b, length))


def profile_step(name: str, step: Callable[[], object], count: int = 20, most: int = 30) -> None:
    for _ in range(3):
        step()
    synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    enqueued = time.perf_counter() - begin
    synchronize()
    total = time.perf_counter() - begin
    with torch.autograd.set_multithreading_enabled(False):
        begin = time.perf_counter()
        for _ in range(count):
            step()
        alone = (time.perf_counter() - begin) / count * 1e3
        synchronize()
    enqueued, total = enqueued / count * 1e3, total / count * 1e3
    print(f"\n{name}: ms until the host returns {enqueued:.3f} (one thread {alone:.3f}), until all is done {total:.3f}")
    # One thread: the backward pass too, whose thread cProfile would not see.
    with torch.autograd.set_multithreading_enabled(False):
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(count):
            step()
        profiler.disable()
    synchronize()
    stats = pstats.Stats(profiler)
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:most]  # type: ignore[attr-defined]
    print("  calls and microseconds of a step, the functions' own time (cProfile's cost included)")
    for (file, line, function), (_, calls, own, cumulative, _) in rows:
        where = "" if file == "~" else f"{'/'.join(Path(file).parts[-3:])}:{line} "
        print(
            f"  {calls / count:7.1f} {own / count * 1e6:9.1f} {cumulative / count * 1e6:9.1f}  {where}{function[:70]}"
        )
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities if torch.cuda.is_available() else activities[:1]) as profiled:
        for _ in range(3):
            step()
        synchronize()
    averages = profiled.key_averages()
    print("  torch's calls: count, own host microseconds, card microseconds")
    for event in sorted(averages, key=lambda e: -(e.self_cpu_time_total + e.self_device_time_total))[:most]:
        print(
            f"  {event.count / 3:7.1f} {event.self_cpu_time_total / 3:9.1f} {event.self_device_time_total / 3:9.1f}"
            f"  {event.key[:90]}"
        )
