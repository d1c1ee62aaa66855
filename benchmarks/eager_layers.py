"""Layers, models and steps that `eager.py` times, on each of its paths, and how they are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

OURS = ("ordinary", "prepared")


class Sizes(NamedTuple):
    """What is timed, on which device."""

    device: str
    vocabulary: int
    mixers: list[tuple[int, int, int]]  # h, b, l
    models: list[tuple[int, int, int, int]]  # h, layers, b, l
    inference: list[tuple[int, int, int, int]]  # h, layers, b, l; one token continues a state
    compiled: list[tuple[int, int, int, int]]  # h, layers, b, l
    seconds: float  # of measuring, for each case
    backend: str = "inductor"  # torch.compile's


FULL = Sizes(
    "cuda", 1024, [(192, 64, 197), (96, 8, 4096), (768, 1, 512), (768, 4, 2048)],
    [(192, 24, 64, 197), (768, 24, 1, 512), (768, 24, 4, 2048)], [(768, 24, 128, 32), (768, 24, 8, 1)],
    [(192, 24, 64, 197), (768, 24, 1, 512)], 0.6,
)  # fmt: skip
TINY = Sizes("cpu", 64, [(16, 1, 8)], [(16, 2, 1, 8)], [(16, 2, 1, 1)], [(16, 1, 1, 8)], 0.01, "aot_eager")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wall(call: Callable[[], object], seconds: float) -> float:
    """Median milliseconds of a call, over runs of calls between synchronisations."""
    for _ in range(3):
        call()
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    count = max(2, min(20, int(0.05 / (time.perf_counter() - begin))))
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        begin = time.perf_counter()
        for _ in range(count):
            call()
        synchronize()
        times.append((time.perf_counter() - begin) / count * 1e3)
    return statistics.median(times)


def one_thread(call: Callable[[], object], seconds: float) -> float:
    with torch.autograd.set_multithreading_enabled(False):
        return wall(call, seconds / 2)


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


def training_step(
    module: Any, inputs: torch.Tensor, output: Callable[[Any], torch.Tensor], compiled: bool = False
) -> Callable[[], object]:
    """Forward and backward under bfloat16 autocast."""
    dy = None

    def step() -> None:
        nonlocal dy
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast(inputs.device.type, torch.bfloat16):
            y = output(module(inputs))
        if dy is None:
            dy = torch.randn_like(y)
        y.backward(dy)

    parameters = list(module.parameters())
    return step


def new_mixer(path: str, h: int) -> Any:
    if path in OURS:
        import mambakit

        return mambakit.MambaMixer(mambakit.MambaConfig(hidden_size=h, num_hidden_layers=1))
    if path == "drop-in":
        from mambakit.compat.mamba import Mamba
    else:
        from mamba_ssm.modules.mamba_simple import Mamba
    return Mamba(h)


def new_model(path: str, h: int, layers: int, vocabulary: int) -> tuple[Any, Callable[[Any], torch.Tensor]]:
    """The model, and how its hidden states are read."""
    if path in OURS:
        import mambakit

        config = mambakit.MambaConfig(hidden_size=h, num_hidden_layers=layers, vocab_size=vocabulary)
        return mambakit.MambaModel(config), lambda y: y.last_hidden_state
    if path == "drop-in":
        from mambakit.compat.mixer_model import MixerModel
    else:
        from mamba_ssm.models.mixer_seq_simple import MixerModel
    named = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    return MixerModel(h, layers, d_intermediate=0, vocab_size=vocabulary, **named), lambda y: y


def mixer_step(path: str, sizes: Sizes, h: int, b: int, length: int) -> Callable[[], object]:
    mixer = new_mixer(path, h).to(sizes.device)
    x = torch.randn(b, length, h, device=sizes.device, requires_grad=True)
    return training_step(mixer, x, lambda y: y)


def model_step(
    path: str, sizes: Sizes, h: int, layers: int, b: int, length: int, mode: str | None = None
) -> Callable[[], object]:
    """``mode``: torch.compile's."""
    model, output = new_model(path, h, layers, sizes.vocabulary)
    model = model.to(sizes.device).train()
    ids = torch.randint(0, sizes.vocabulary, (b, length), device=sizes.device)
    if mode is None:
        return training_step(model, ids, output)
    if sizes.backend != "inductor":  # others have no modes
        return training_step(torch.compile(model, backend=sizes.backend), ids, output, compiled=True)
    return training_step(torch.compile(model, mode=mode), ids, output, compiled=True)


def inference_call(path: str, sizes: Sizes, h: int, layers: int, b: int, length: int) -> Callable[[], object]:
    """bfloat16 weights, no gradient; to be called under torch.no_grad()."""
    model = new_model(path, h, layers, sizes.vocabulary)[0].to(sizes.device, torch.bfloat16).eval()
    ids = torch.randint(0, sizes.vocabulary, (b, length), device=sizes.device)
    cache = model(ids).cache if length == 1 else None
    return lambda: model(ids, cache_params=cache, use_cache=True)


def use_path(path: str) -> None:
    """Make mambakit take this path in this process."""
    if path == "ordinary":
        from mambakit.modules.mixers import fused_layer, mamba
        from mambakit.ops.fused_mixer import fused_mixer

        fused_layer.run = lambda *arguments, **named: None
        mamba.mix_rows = lambda xz, weights, eps=None: fused_mixer(xz, weights, mixer_eps=eps)[0]


def check(path: str, sizes: Sizes) -> None:
    """Gradients of a small model beside float64 on the CPU, in float32 and under autocast."""
    from mambakit.ops.fused_mixer import layer

    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 300))
    dy = torch.randn(2, 300, 64, dtype=torch.float64)
    exact, output = new_model(path if path in OURS else "drop-in", 64, 2, 64)
    model, _ = new_model(path, 64, 2, 64)
    model.load_state_dict(exact.state_dict())
    model, exact = model.to(sizes.device).train(), exact.double().train()
    (output(exact(ids)) * dy).sum().backward()
    wanted = {name: p.grad for name, p in exact.named_parameters()}
    for half, limit in ((False, 1e-4), (True, 0.1)):
        model.zero_grad()
        with torch.autocast(sizes.device, torch.bfloat16, enabled=half):
            y = output(model(ids.to(sizes.device)))
        (y * dy.to(sizes.device)).sum().backward()
        for name, p in model.named_parameters():
            error = ((p.grad.cpu() - wanted[name]).norm() / wanted[name].norm()).item()
            if error > limit and path == "mamba-ssm":
                print(f"{path}: the gradient of {name} is {error:.1e} off (bfloat16: {half})", flush=True)
            elif error > limit:
                raise SystemExit(f"{path}: the gradient of {name} is {error:.1e} off (bfloat16: {half}): not timed")
    plans = [plan for plan in layer._plans.values() if plan is not None]
    if sizes.device == "cuda" and (path in ("prepared", "drop-in")) != bool(plans):
        raise SystemExit(f"{path}: {len(plans)} plans were made: {list(layer._plans)}")
