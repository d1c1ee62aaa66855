"""Time whole training steps of published shapes on one NVIDIA GPU.

    python benchmarks/train_step.py                         # the table below
    python benchmarks/train_step.py --only 130m --json out.json

float32 parameters, bfloat16 autocast, fused AdamW, no activation checkpointing, random tokens; median of steps between
CUDA events, as one CUDA graph (what `mambakit train` runs), with --eager eagerly too, with --recompute also with
`recompute_selection`, with --float8 with in_proj and out_proj in float8 (torchao). `peer` is mamba-ssm at commit
e9594ce with the same settings, RECORDED on an H100 on 2026-11-23, not measured in this run. A model is first checked:
its loss and its embedding's gradient against the float64 reference on the CPU, on a small model of the same make.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mambakit
from benchmarks import record
from mambakit.training.float8 import require_float8, use_float8
from mambakit.training.model import recompute_selection
from mambakit.training.optimizer import make_optimizer
from mambakit.training.step import CapturedStep, TrainingStep

# name, width, layers, batch, length, mamba-ssm's tokens per second
CASES = [
    ("130m", 768, 24, 16, 2048, 164_108),
    ("130m", 768, 24, 1, 32768, 156_859),
    ("1.4b", 2048, 48, 4, 2048, 27_975),
]


def check() -> None:
    config = mambakit.MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2)
    model = mambakit.MambaForCausalLM(config).double()
    ids = torch.randint(0, 512, (2, 300))
    expected = model(ids, labels=ids).loss
    expected.backward()
    wanted = model.backbone.embeddings.weight.grad.clone()
    model = model.float().cuda()
    model.zero_grad()
    loss = model(ids.cuda(), labels=ids.cuda()).loss
    loss.backward()
    error = (model.backbone.embeddings.weight.grad.cpu() - wanted).norm() / wanted.norm()
    assert abs(loss.item() - expected.item()) < 1e-4, (loss, expected)
    assert error < 1e-3, f"the gradient is {error:.1e} off: nothing is timed"


def measure(width: int, layers: int, batch: int, length: int, how: str, steps: int, profiled: bool) -> dict:
    captured = how != "eager"
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config = mambakit.MambaConfig(hidden_size=width, num_hidden_layers=layers)
    with torch.device("cuda"):
        model = mambakit.MambaForCausalLM(config).train()
    if how == "recompute":
        recompute_selection(model)
    if how == "float8":
        require_float8(torch.device("cuda", torch.cuda.current_device()))
        use_float8(model, batch * length)
    plain = TrainingStep(model, make_optimizer(model, 1e-4, (0.9, 0.95), 0.1), 1.0, "bfloat16", False)
    run = CapturedStep(plain) if captured else plain
    rows = [torch.randint(0, config.vocab_size, (batch, length + 1), device="cuda") for _ in range(3)]
    begins = torch.zeros_like(rows[0], dtype=torch.bool)
    for i in range(5):
        run.run(rows[i % 3], begins)
    times = []
    for i in range(steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run.run(rows[i % 3], begins)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    if profiled:
        print_kernels(lambda: run.run(rows[0], begins))
    return {"ms": statistics.median(times), "gib": torch.cuda.max_memory_allocated() / 2**30}


def print_kernels(step: Callable[[], object], most: int = 25) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda row: -row.device_time_total)
    for row in rows[:most]:
        print(f"  {row.device_time_total / 1e3:9.3f} ms {row.count:6}  {row.key[:120]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases of this name")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--eager", action="store_true", help="eager steps too")
    parser.add_argument("--recompute", action="store_true", help="and with recompute_selection: less memory, more work")
    parser.add_argument("--float8", action="store_true", help="and with in_proj and out_proj in float8, by torchao")
    parser.add_argument(
        "--profile", action="store_true", help="and the kernels of one step that take longest, by torch's profiler"
    )
    record.add_argument(parser)
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    check()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    print(f"{'model':6} {'batch':>12} {'how':>9} {'ms':>8} {'tokens/s':>10} {'GiB':>6} {'of peer (recorded)':>18}")
    results = []
    for name, width, layers, batch, length, peer in CASES:
        if arguments.only and name != arguments.only:
            continue
        more = ("eager", "recompute", "float8")
        for how in ["graph", *(how for how in more if getattr(arguments, how))]:
            result = measure(width, layers, batch, length, how, arguments.steps, arguments.profile)
            rate = batch * length / result["ms"] * 1e3
            print(
                f"{name:6} {batch:>4} x {length:>5} {how:>9} {result['ms']:8.1f} {rate:10,.0f} {result['gib']:6.1f} "
                f"{rate / peer:17.2f}x",
                flush=True,
            )
            results.append(
                {"model": name, "batch": batch, "length": length, "how": how, "tokens_per_second": rate, **result}
            )
            record.write(arguments.json, {"train_step": results}, gpus=1)


if __name__ == "__main__":
    main()
