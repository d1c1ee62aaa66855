"""Training on several NVIDIA GPUs of one machine, against one of them.

    python benchmarks/multi_gpu.py --gpus 2 --json multi_gpu.json
    python benchmarks/multi_gpu.py --gpus 4 --only training --rows 4 --json training.json   # in parts of some minutes
    python benchmarks/multi_gpu.py --gpus 4 --only context --sequences 2 --json context.json
    python benchmarks/multi_gpu.py --one-gpu      # what one GPU can say: the one-GPU rows, and a process's own share

1. training: tokens per second of the 1.4b shape with DDP and FSDP2, --rows of 2048 tokens a GPU, against one GPU that
   runs the same step on as many rows; each as a CUDA graph, with --eager also eagerly (of one GPU the faster counts).
   `8x2` is 8 rows at a time, twice, their gradients added before the update.
2. context: one sequence over all GPUs, activations checkpointed: time and peak memory of forward and backward, and the
   distance of the loss and of every gradient from one GPU's. `rounding` is the distance of one GPU's own bfloat16
   gradients from its float32 ones, on the shortest case: what two correct runs may differ by.

`--one-gpu` times half a sequence as one of two processes would compute it, exchange of states left out: `bound` is the
speed-up that is left if communication cost nothing.

float32 parameters, bfloat16 autocast, random weights and tokens. Every measurement is a process (torchrun starts as
many as it takes), so that memory is its own. NCCL's NVLink multicast stays off (NCCL_NVLS_ENABLE=0). Replicas of the
server are another script's: `benchmarks/serving.py --replicas 4 --compare`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from benchmarks.record import ROOT

SHAPES = {"1.4b": (2048, 48), "130m": (768, 24), "130m, 12 layers": (768, 12), "130m, 4 layers": (768, 4)}
LENGTH = 2048
WAYS: dict[str, tuple[str, dict]] = {
    "one GPU": ("none", {}),
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "fsdp, reshard_after_forward=false": ("fsdp", {"reshard_after_forward": False}),
    "ddp, reduce_dtype=bfloat16": ("ddp", {"reduce_dtype": "bfloat16"}),
    "fsdp, both": ("fsdp", {"reshard_after_forward": False, "reduce_dtype": "bfloat16"}),
}
"""By name: mode and options."""
# The last one is more than one GPU of 80 GB holds.
SEQUENCES = [("130m", 262_144), ("130m, 4 layers", 1_048_576), ("130m, 12 layers", 1_048_576)]


def make_model(shape: str):
    import mambakit

    width, layers = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device("cuda"):
        return mambakit.MambaForCausalLM(mambakit.MambaConfig(hidden_size=width, num_hidden_layers=layers)).train()


def timed(run, warm: int, count: int) -> float:
    """Median seconds of ``run()``."""
    times = []
    for i in range(warm + count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= warm:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def training(mode: str, captured: bool, per_gpu: int, parts: int, options: dict) -> dict:
    """Whole steps: forward and backward of ``parts`` times ``per_gpu`` rows, clip, AdamW. ``options``: `mambakit
    train`'s reduce_dtype and reshard_after_forward."""
    from mambakit.training.distributed import process_mesh
    from mambakit.training.optimizer import make_optimizer
    from mambakit.training.step import CapturedStep, Objective, TrainingStep

    with process_mesh(mode) as mesh:
        model = make_model("1.4b")
        options["reduce_dtype"] = getattr(torch, options.get("reduce_dtype", "float32"))
        objective = mesh.parallelize(Objective(model), model, **options)
        optimizer = make_optimizer(model, 1e-4, (0.9, 0.95), 0.1)
        step = TrainingStep(
            model, optimizer, 1.0, "bfloat16", False, accumulate=parts, processes=mesh, objective=objective
        )  # fmt: skip
        runner = CapturedStep(step) if captured else step
        rows = torch.randint(0, model.config.vocab_size, (per_gpu * parts * mesh.world, LENGTH + 1), device=mesh.device)
        begins = torch.zeros_like(rows, dtype=torch.bool)
        torch.cuda.reset_peak_memory_stats()
        seconds = timed(lambda: runner.run(rows, begins), 5, 10)
        return {
            "seconds": seconds, "tokens_per_second": rows.shape[0] * LENGTH / seconds,
            "gib": torch.cuda.max_memory_allocated() / 2**30, "first": mesh.first,
        }  # fmt: skip


def context(shape: str, length: int, mode: str, autocast: bool, gradients: str, share: int) -> dict:
    """Forward and backward of one sequence; ``share`` > 1 takes that part of it, as one process of as many would."""
    from mambakit.training.distributed import context_parallel, process_mesh
    from mambakit.training.step import Objective

    world = int(os.environ.get("WORLD_SIZE", 1))
    with process_mesh(mode, world if mode != "none" else 1) as mesh:
        model = make_model(shape)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, model.config.vocab_size, (1, length + 1), generator=generator).to(mesh.device)
        if share > 1:  # a group of one: what a process computes for the exchange, without the exchange
            tokens = tokens[:, : length // share + 1]
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
            context_parallel(model, torch.distributed.group.WORLD)
        objective = mesh.parallelize(Objective(model), model)
        part = mesh.sequence_shard(tokens.shape[1] - 1)
        inputs, targets = tokens[:, :-1][:, part], tokens[:, 1:][:, part]
        count = torch.tensor((tokens.shape[1] - 1) / mesh.world, device=mesh.device)
        found = {}

        def run() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
                loss = objective(inputs, targets, count)
            loss.backward()
            found["loss"] = loss.detach()

        torch.cuda.reset_peak_memory_stats()
        result = {"seconds": timed(run, 2, 3), "gib": torch.cuda.max_memory_allocated() / 2**30, "first": mesh.first}
        result["loss"] = float(mesh.mean(found["loss"]))
        if mesh.first and gradients:
            result |= compare({n: p.grad.cpu() for n, p in model.named_parameters()}, Path(gradients))
        return result


def compare(gradients: dict[str, torch.Tensor], path: Path) -> dict:
    """Keep the gradients where there are none yet; else their distance from those kept, relative, the worst tensor's
    too."""
    if not path.is_file():
        torch.save(gradients, path)
        return {}
    kept = torch.load(path, weights_only=True)
    errors = {n: float((g - kept[n]).norm() / kept[n].norm()) for n, g in gradients.items()}
    worst = max(errors, key=errors.get)
    whole = sum(float((g - kept[n]).norm()) ** 2 for n, g in gradients.items()) ** 0.5
    norm = sum(float(g.norm()) ** 2 for g in kept.values()) ** 0.5
    return {"gradient_error": whole / norm, "worst_error": errors[worst], "worst": worst}


def measure(gpus: int, name: str, *arguments: object) -> dict:
    """Run one measurement on ``gpus`` GPUs; what its first process found, or why there is nothing."""
    worker = [str(Path(__file__)), "--worker", name, json.dumps(arguments)]
    command = [sys.executable, *worker]
    if gpus > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", *worker]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            print(f"  {name} {arguments} on {gpus}: {line.removeprefix('RESULT ')}", file=sys.stderr, flush=True)
            return json.loads(line.removeprefix("RESULT "))
    if "OutOfMemoryError" in done.stderr:
        return {"error": "out of memory"}
    sys.exit(f"{name} {arguments} on {gpus} GPUs failed:\n{done.stderr[-4000:]}")


def training_rows(
    gpus: int, batch: str, eager: bool, ways: list[str], rows: list[dict], save: Callable[[list[dict]], None]
) -> None:
    """``rows`` gets this batch's, and is saved after each: a run that is cut off leaves what it has."""
    per_gpu, parts = (int(number) for number in f"{batch}x1".split("x")[:2])
    mine: list[dict] = []
    for way in ("one GPU", *ways) if gpus > 1 else ("one GPU",):
        mode, options = WAYS[way]
        count = 1 if mode == "none" else gpus
        for captured in (False, True) if eager else (True,):
            case = {"how": f"{way}, {'CUDA graph' if captured else 'eager'}", "gpus": count, "rows a GPU": batch}
            row = {**case, **measure(count, "training", mode, captured, per_gpu, parts, options)}
            mine.append(row)
            rows.append(row)
            best = max(one.get("tokens_per_second", 0.0) for one in mine if one["gpus"] == 1)
            for one in mine:
                if "tokens_per_second" in one and best:
                    one["speedup"] = one["tokens_per_second"] / best
            save(rows)


def context_rows(gpus: int, sequences: list, save: Callable[[list[dict]], None]) -> list[dict]:
    rows: list[dict] = []
    for shape, length in sequences:
        with tempfile.TemporaryDirectory() as folder:
            kept = str(Path(folder) / "gradients.pt")
            case = {"model": shape, "length": length}
            one = {"how": "one GPU", "gpus": 1, **case, **measure(1, "context", shape, length, "none", True, kept, 1)}
            rows.append(one)
            if (shape, length) == SEQUENCES[0]:
                single = measure(1, "context", shape, length, "none", False, kept, 1)
                rows.append({"how": "one GPU, float32 (rounding)", "gpus": 1, **case, **single})
            if gpus > 1:
                spread = measure(gpus, "context", shape, length, "ddp", True, kept, 1)
            else:
                spread = measure(1, "context", shape, length, "none", True, "", 2)
            row = {"how": f"{gpus} GPUs" if gpus > 1 else "half, no exchange (bound)", "gpus": gpus, **case, **spread}
            if "seconds" in row and "seconds" in one:
                row["speedup"] = one["seconds"] / row["seconds"]
                row["memory_ratio"] = row["gib"] / one["gib"]
            rows.append(row)
            save(rows)
    return rows


def table(rows: list[dict], columns: list[str]) -> str:
    def cell(value: object) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--one-gpu", action="store_true", help="only what one GPU can say")
    parser.add_argument("--rows", nargs="+", default=["4", "8", "8x2"], help="of 2048 tokens a GPU, in training")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS)[1:], default=["ddp", "fsdp"], help="of training")
    parser.add_argument("--eager", action="store_true", help="training steps without CUDA graphs, too")
    parser.add_argument("--only", choices=["training", "context"])
    parser.add_argument("--shortest", action="store_true", help="only the shortest sequence")
    parser.add_argument(
        "--sequences", nargs="+", type=int, choices=range(len(SEQUENCES)), help="which of the sequences (default: all)"
    )
    record.add_argument(parser)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        torch.set_float32_matmul_precision("high")
        name, values = arguments.worker
        result = {"training": training, "context": context}[name](*json.loads(values))
        if result.pop("first"):
            print("RESULT " + json.dumps(result), flush=True)
        return
    gpus = 1 if arguments.one_gpu else arguments.gpus
    there = torch.cuda.device_count()
    if there < gpus:
        sys.exit(
            f"this machine has {there} NVIDIA GPUs, {gpus} are asked for; run it where there are as many, lower "
            f"--gpus, or see "
            "what one GPU can say with --one-gpu"
        )
    if gpus == 1 and not arguments.one_gpu:
        sys.exit("--gpus is 1; --one-gpu is that run")
    report: dict[str, list[dict]] = {}

    def save(part: str, rows: list[dict]) -> None:
        report[part] = rows
        record.write(arguments.json, report, gpus=gpus, notes="NCCL_NVLS_ENABLE=0", cuda=str(torch.version.cuda))

    print(f"{gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if arguments.only != "context":
        found: list[dict] = []
        for batch in arguments.rows:
            training_rows(gpus, batch, arguments.eager, arguments.ways, found, partial(save, "training"))
        columns = ["how", "gpus", "rows a GPU", "tokens_per_second", "speedup", "seconds", "gib", "error"]
        print(table(report["training"], columns), flush=True)
    if arguments.only != "training":
        chosen = [0] if arguments.shortest else arguments.sequences or range(len(SEQUENCES))
        odd = [SEQUENCES[i] for i in chosen if SEQUENCES[i][1] % gpus]
        if odd:
            sys.exit(f"{odd[0][1]} tokens cannot be divided evenly over {gpus} GPUs; choose others by --sequences")
        context_rows(gpus, [SEQUENCES[i] for i in chosen], partial(save, "context"))
        columns = ["model", "length", "how", "seconds", "speedup", "gib", "memory_ratio", "loss", "gradient_error"]
        print(table(report["context"], [*columns, "worst_error", "worst", "error"]), flush=True)


if __name__ == "__main__":
    main()
