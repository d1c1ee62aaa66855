"""The decode steps on one NVIDIA GPU: how the persistent kernel's queue of weights is chosen, where its time goes, and
which way serves how many rows.

    python benchmarks/decode_step.py                 # the shapes below, the chosen variant and its rivals
    python benchmarks/decode_step.py --shapes 130m --rows 1 8 --formats plain int4
    python benchmarks/decode_step.py --ways --rows 1 4 8 16 32 64 128     # every way that can serve so many rows
    python benchmarks/decode_step.py --ways --shapes 7b --families falcon plain --rows 1 8 32 64     # FalconMamba-7B's

`ms` is the median of graph replays, bfloat16, random weights; a variant whose logits are further than 1.2e-2 from the
model's forward is printed as WRONG. `queue 6, 2, 1`: 6 slots of each warp's ring, 2 of them filled again at once at the
end of a phase, 1 more while the block waits after it. With --clock, the cycles of one block's first thread, a layer,
for the chosen variant. docs/kernels/decode.md has what was found.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mambakit
from benchmarks import record
from mambakit.decoding.graph_step import gpu_weights
from mambakit.ops.decode import cuda_persistent as persistent
from mambakit.ops.decode import triton_few_rows, triton_many_rows, triton_packed_rows
from mambakit.ops.decode.cuda_persistent import PARTS, PersistentStep
from mambakit.ops.linear.triton_plan import MOST_IN_REGISTERS

SHAPES = {
    "130m": (768, 24),
    "370m": (1024, 48),
    "790m": (1536, 48),
    "1.4b": (2048, 48),
    "2.8b": (2560, 64),
    "7b": (4096, 64),
}
VOCABULARIES = {"7b": 65024}  # others: 50,280
FAMILIES = {
    "plain": (mambakit.MambaConfig, mambakit.MambaForCausalLM),
    "falcon": (mambakit.FalconMambaConfig, mambakit.FalconMambaForCausalLM),
}
RIVALS = [
    {"queue": queue}
    for queue in ((3, 3, 0), (4, 4, 0), (6, 6, 0), (4, 2, 1), (4, 2, 2), (6, 2, 1), (6, 2, 4), (8, 2, 1), (8, 2, 6))
]
TOKEN = 11


def made(family: str, shape: str, format: str):
    width, layers = SHAPES[shape]
    config, kind = FAMILIES[family]
    torch.manual_seed(0)
    vocabulary = VOCABULARIES.get(shape, 50280)
    with torch.device("cuda"):
        model = kind(config(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers))
    model = model.to(torch.bfloat16).eval()
    return model if format == "plain" else model.quantize(format)


def step_of(model, rows: int, **variant) -> PersistentStep:
    cache = model.backbone.new_cache(rows)
    step = PersistentStep(gpu_weights(model), cache.conv_states, cache.ssm_states, capacity=8, **variant)
    step.tokens.fill_(TOKEN)
    return step


def compiled(model, rows: int, variants: list[dict]) -> dict[int, PersistentStep | str]:
    """The variants' steps, compiled side by side; a message where one cannot serve."""

    def attempt(variant: dict) -> PersistentStep | str:
        try:
            return step_of(model, rows, **variant)
        except (ValueError, RuntimeError) as error:
            return str(error).splitlines()[0]

    with ThreadPoolExecutor() as pool:
        return dict(enumerate(pool.map(attempt, variants)))


def ways(model, rows: int) -> dict[str, Callable[[bool], torch.Tensor]]:
    """The steps that can serve so many rows, by name."""
    weights, cache = gpu_weights(model), model.backbone.new_cache(rows)

    def states() -> tuple[torch.Tensor, torch.Tensor]:
        own = model.backbone.new_cache(rows)
        return own.conv_states, own.ssm_states

    tokens = torch.full((rows, 1), TOKEN, device="cuda")
    found: dict[str, Callable[[bool], torch.Tensor]] = {
        "forward": lambda choose: model(tokens, cache_params=cache).logits[:, -1],
    }
    if persistent.why_not(weights, rows, cache.conv_states.dtype) is None:
        found["persistent"] = step_of(model, rows)
    if rows <= triton_few_rows.MOST_ROWS:
        found["few rows"] = triton_few_rows.FewRowsStep(weights, *states(), capacity=8)
    if weights.kind is None and rows <= triton_many_rows.MOST_ROWS:
        found["many rows"] = triton_many_rows.ManyRowsStep(weights, *states(), capacity=8)
    if weights.kind is not None and rows <= triton_packed_rows.MOST_ROWS:
        found["many rows, packed"] = triton_packed_rows.PackedRowsStep(weights, *states(), capacity=8)
    for step in found.values():
        if hasattr(step, "tokens"):
            step.tokens.fill_(TOKEN)
    return found


def milliseconds(step: Callable[[bool], torch.Tensor], rounds: int) -> float:
    step(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(True)
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["130m", "1.4b", "2.8b"])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["plain"])
    parser.add_argument(
        "--formats", nargs="+", choices=("plain", "int8", "int4", "fp8"), default=["plain", "int8", "int4"]
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--clock", action="store_true")
    parser.add_argument("--ways", action="store_true")
    record.add_argument(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU is here; the kernel's logic runs on a CPU in tests/ops/decode/test_cuda_persistent.py")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    results, clocks = [], []

    def save() -> None:
        part = "ways" if options.ways else "variants"
        record.write(options.json, {part: results, **({"cycles": clocks} if options.clock else {})}, gpus=1)

    cases = itertools.product(options.families, options.shapes, options.formats)
    for family, shape, format in cases:
        model = made(family, shape, format)
        label = shape if family == "plain" else f"{family} {shape}"
        what = {"family": family, "shape": shape, "format": format}
        for rows in options.rows:
            ids = torch.full((rows, 1), TOKEN, device="cuda")
            expected = model(ids, cache_params=model.backbone.new_cache(rows)).logits[:, -1].float()
            if options.ways:
                for name, step in ways(model, rows).items():
                    error = float((step(False).float() - expected).norm() / expected.norm())
                    ms = milliseconds(step, options.rounds)
                    # The forward rounds many rows to float8, and the step does not.
                    bound = 0.1 if format == "fp8" and rows > MOST_IN_REGISTERS["fp8"] else 1.2e-2
                    wrong = "" if error < bound else f"  WRONG, {error:.1e}"
                    print(f"{label} {format:>5} x {rows}  {name}: {ms:.4f} ms{wrong}", flush=True)
                    results.append({**what, "rows": rows, "way": name, "ms": ms, "error": error})
                save()
                continue
            variants = [{}, *RIVALS]
            for index, step in compiled(model, rows, variants).items():
                name = f"{label} {format:>5} x {rows}  {variants[index] or 'chosen'}"
                if isinstance(step, str):
                    print(f"{name}: {step}")
                    continue
                logits = step().clone()
                error = float((logits - expected).norm() / expected.norm())
                ms = milliseconds(step, options.rounds)
                print(f"{name}: {ms:.4f} ms" + ("" if error < 1.2e-2 else f"  WRONG, {error:.1e}"), flush=True)
                results.append({**what, "rows": rows, **variants[index], "ms": ms, "error": error})
                save()
            if options.clock:
                step = step_of(model, rows, clock=True)
                for _ in range(5):
                    step(True)
                cycles = [count / SHAPES[shape][1] for count in step.cycles.tolist()]
                clocks.append({**what, "rows": rows, **dict(zip(PARTS, cycles, strict=True))})
                print("   ", ", ".join(f"{part} {count:.0f}" for part, count in zip(PARTS, cycles, strict=True)))
        del model
        torch.cuda.empty_cache()
    save()


if __name__ == "__main__":
    main()
