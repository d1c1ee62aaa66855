"""Products of packed weights on one NVIDIA GPU, at every number of rows: check, then time every way beside bfloat16.

    python benchmarks/packed_products.py                                   # check, then the table of ways
    python benchmarks/packed_products.py --ways ours --rows 1 8 16 32 64 128 --shapes "7b in_proj" "7b out_proj"
    python benchmarks/packed_products.py --sweep                           # and every candidate tile, best first
    python benchmarks/packed_products.py --parts prompts --models 1.4b 7b  # whole prompts, bfloat16 beside each format

What is wrong is not timed. Kernels are compiled side by side first: most of the time of a run on a new machine. The
record is written after every number of rows. `ms` is the median of CUDA-graph replays over rotating weights, so that
they come from memory; x is bfloat16. The ways, for weights of the layers of a 1.4b and a 7B model:

    bf16          cuBLAS on the plain weight
    ours          `torch.ops.mambakit.linear`, what mambakit.ops.linear.triton_plan chooses; the column after ms is the
                  ratio to bf16
    registers     the table's tile for so many rows, where it does not choose it, too
    widen         the weight widened in memory, then cuBLAS; with `slab` so many MiB at a time
    widen alone   without the product; GB/s of what it reads and writes
    PyTorch       its own packed products: int8 `_weight_int8pack_mm` (one scale a row) and `_int_mm` (x in int8, no
                  scales), int4 `_weight_int4pack_mm` (groups of 64), fp8 `_scaled_mm` alone, x in float8 already
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mambakit
from benchmarks import record
from mambakit.decoding.prefill import prefill
from mambakit.ops.linear import linear, pack
from mambakit.ops.linear import triton as gpu
from mambakit.ops.linear import triton_plan as plans
from mambakit.ops.linear.packed import SCALED, PackedWeight

BF16 = torch.bfloat16
SHAPES = {  # out, in
    "1.4b in_proj": (8192, 2048), "1.4b out_proj": (2048, 4096), "1.4b x_proj": (160, 4096),
    "7b in_proj": (16384, 4096), "7b out_proj": (4096, 8192), "7b x_proj": (288, 8192),
}  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
WAYS = ("ours", "registers", "widen", "PyTorch")
SWEPT_ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
MODELS = {
    "1.4b": {"hidden_size": 2048, "num_hidden_layers": 48},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 65024},
}
PROMPTS = ((1, 128), (1, 512), (1, 2048), (4, 2048), (8, 2048))
BOUND = 8e-3  # of a bfloat16 product: weights and the result are rounded
FLOAT8_BOUND = 4e-2  # x is rounded to 4 bits


# -- correctness -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What a call should give, and how far from it it may be."""

    name: str
    call: Callable[[], Tensor]
    want: Tensor  # float64
    bound: float


def expectations(device: str) -> list[Expected]:
    """Every format, group, way and tile of the table. Each takes a compilation or two, so there are few of each."""
    found = []
    for format in SCALED:
        for group in (64, 32, 128) if format != "fp8" else (64,):
            n, k = (1000, 520) if group == 64 else (144, 1088)  # an odd size, and one whose sums are split
            weight = packed(n, k, format, group, device)
            exact, bias = weight.dequantized().double(), torch.randn(n, device=device)
            for rows in (5, 33, 100, 257, 700) if group == 64 else (5, 20, 50, 100, 257):
                x = torch.randn(rows, k, device=device).to(BF16)
                want, name = x.double() @ exact.T + bias.double(), f"{format} {group} {rows} x {n} x {k}"
                rounded = format == "fp8" and plans.takes_float8(BF16, rows, n, k)
                found.append(Expected(name, partial(linear, x, weight, bias), want, FLOAT8_BOUND if rounded else BOUND))
                if rows == 5:
                    found.append(Expected(f"{name} float32", partial(linear, x.float(), weight, bias), want, 1e-5))
                if rows == 700:
                    slabs = partial(gpu.widened, x, weight, bias, 256 * k * 2)
                    found.append(Expected(f"{name} slabs", slabs, want, BOUND))
        x = torch.randn(64, 2048, device=device).to(BF16)
        weight, norm = packed(2048, 2048, format, 64, device), torch.rand(2048, device=device)
        total = 2 * x.double()
        normed = total * torch.rsqrt(total.square().mean(1, keepdim=True) + 1e-5) * norm.double()

        def both(i: int, x: Tensor = x, norm: Tensor = norm, weight: PackedWeight = weight) -> Tensor:
            return mambakit.ops.linear.normed_linear(x, norm, weight, residual=x.float())[i]

        want = normed @ weight.dequantized().double().T
        found.append(Expected(f"{format} norm", partial(both, 0), want, FLOAT8_BOUND if format == "fp8" else 1e-2))
        found.append(Expected(f"{format} residual", partial(both, 1), total, 1e-6))
    return found


def exactly(device: str) -> list[Expected]:
    """Numbers of each format that a product gives back: of a weight with every one of them, and rows of x that are 1
    in one column."""
    found = []
    for dtype, plan in (
        (BF16, plans.Product(64, 32, 128, 2, 3, after=True)), (BF16, plans.Product(64, 64, 128, 4, 3, rows_first=True)),
        (torch.float16, plans.Product(64, 32, 64, 4, 3, after=True)),
        (torch.float16, plans.Product(64, 64, 64, 4, 3, rows_first=True)),
        (BF16, plans.Product(64, 64, 128, 4, 4, hopper=True)), (torch.float16, plans.QUARTER),
    ):  # fmt: skip
        for name, weight in every_number(device).items():
            fitted = plan.fitting(name, weight.group, 2, 200 << 10)
            eye = torch.eye(weight.in_features, dtype=dtype, device=device)
            if plan.hopper and not gpu.takes_hopper(eye, weight):
                continue
            call = partial(gpu.in_registers, eye, weight, None, fitted)
            found.append(Expected(f"{name} in {dtype} by {plan}", call, weight.dequantized().double().T, 0.0))
    return found


def side_by_side(calls: list[Callable[[], object]]) -> list[object]:
    """Their results, or errors. Threads, because each compiles a kernel first, mostly outside of Python."""

    def attempt(call: Callable[[], object]) -> object:
        try:
            return call()
        except Exception as error:  # whatever the compiler says
            return error

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(attempt, calls))


def wrong(device: str = "cuda") -> list[str]:
    """What differs from float64 by more than it may."""
    expected, found = [*exactly(device), *expectations(device)], []
    for one, got in zip(expected, side_by_side([one.call for one in expected]), strict=True):
        if not isinstance(got, Tensor):
            found.append(f"{one.name}: {str(got).splitlines()[0]}")
            continue
        error = ((got.double() - one.want).norm() / one.want.norm()).item()
        if not error <= one.bound:
            found.append(f"{one.name}: {error:.1e}, more than {one.bound:g}")
    return found


def every_number(device: str) -> dict[str, PackedWeight]:
    """Weights with each number of a format, scales 1."""
    q8 = torch.arange(-128, 128, device=device).to(torch.int8).repeat(64, 1)
    q4 = torch.arange(-8, 8, device=device).to(torch.int8).repeat(64, 16)
    e4m3 = torch.arange(256, device=device).to(torch.uint8)
    e4m3[(e4m3 & 127) == 127] = 0  # no NaN
    ones = torch.ones(64, 4, device=device)
    from mambakit.ops.linear.packed import pack_integers

    return {
        "int8": pack_integers(q8, ones, "int8", 64), "int4": pack_integers(q4, ones, "int4", 64),
        "fp8": PackedWeight("fp8", e4m3.repeat(64, 1), ones[:, :1].contiguous(), 256),
    }  # fmt: skip


def packed(n: int, k: int, format: str, group: int = 64, device: str = "cuda") -> PackedWeight:
    return pack(torch.randn(n, k, device=device) / k**0.5, format, group)


# -- times -------------------------------------------------------------------------------------------------------------


def milliseconds(calls: list[Callable[[], object]], repeats: int = 15) -> float:
    """Median time of one of ``calls``, replayed together from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) / len(calls)


def copies(weight: PackedWeight) -> list[PackedWeight]:
    """So many that an L2 of 60 MB holds few of them."""
    count = max(2, min(12, -(-160_000_000 // weight.nbytes)))
    return [replace(weight, data=weight.data.clone(), scales=weight.scales.clone()) for _ in range(count)]


def peers(format: str, x: Tensor, n: int, k: int) -> dict[str, list[Callable[[], object]]]:
    """PyTorch's own products of packed weights, where this release has them for this card and size."""
    rows, found = x.shape[0], {}
    count = max(2, min(12, -(-160_000_000 // (n * k))))
    if format == "int8":
        weights = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda") for _ in range(count)]
        scales = torch.rand(n, device="cuda", dtype=BF16)
        found["_weight_int8pack_mm"] = [partial(torch._weight_int8pack_mm, x, w, scales) for w in weights]
        q = torch.randint(-127, 128, (max(rows, 32), k), dtype=torch.int8, device="cuda")
        found["_int_mm"] = [partial(torch._int_mm, q, w.T) for w in weights]
    elif format == "int4":
        bits = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        zeros = torch.rand(k // 64, n, 2, device="cuda", dtype=BF16)
        try:
            weights = [torch._convert_weight_to_int4pack(bits, 8).clone() for _ in range(2 * count)]
        except RuntimeError as error:
            print(f"    _weight_int4pack_mm: {str(error).splitlines()[0]}")
            return found
        found["_weight_int4pack_mm"] = [partial(torch._weight_int4pack_mm, x, w, 64, zeros) for w in weights]
    elif format == "fp8":
        weights = [packed(n, k, "fp8") for _ in range(count)]
        q, scales = gpu.rows_in_float8(x)
        found["_scaled_mm"] = [partial(gpu.scaled, q, scales, w, None, BF16) for w in weights]
    return found


def attempt(calls: list[Callable[[], object]]) -> float | str:
    try:
        return milliseconds(calls)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        torch.cuda.synchronize()
        return str(error).splitlines()[0][:100]


def time_rows(
    shape: str, rows: int, weights: dict[str, list[PackedWeight]], plain: list[Tensor], chosen: list[str], first: bool
) -> list[dict]:
    """Every way of one number of rows."""
    n, k = SHAPES[shape]
    x = torch.randn(rows, k, device="cuda").to(BF16)
    base = milliseconds([partial(torch.mm, x, w.T) for w in plain])
    line = {"shape": shape, "rows": rows}
    results: list[dict] = [{**line, "format": "bf16", "way": "bf16", "ms": base, "ratio": 1.0}]
    print(f"{shape:<14}{rows:>6} rows  bf16 {base:.4f} ms", flush=True)
    for format, several in weights.items():
        ways: dict[str, list[Callable[[], object]]] = {"ours": [partial(linear, x, w) for w in several]}
        tile = plans.tile_of(format, rows).fitting(format, 64, 2, shared_memory())
        if "registers" in chosen and rows <= 4096:
            ways["registers"] = [partial(gpu.in_registers, x, w, None, tile) for w in several]
        for slab in plans.SLABS if "widen" in chosen and rows >= 64 else ():
            if slab < n * k * 2:
                name = f"widen, slab {slab >> 20}" if slab else "widen"
                ways[name] = [partial(gpu.widened, x, w, None, slab) for w in several]
        if first:
            memory = torch.empty(n, k, dtype=BF16, device="cuda")
            ways["widen alone"] = [partial(gpu.widen_into, memory, w) for w in several]
        if "PyTorch" in chosen:
            ways |= {f"PyTorch {name}": calls for name, calls in peers(format, x, n, k).items()}
        for way, calls in ways.items():
            ms = attempt(calls)
            if isinstance(ms, str):
                print(f"    {format} {way}: {ms}")
                continue
            rate = (several[0].nbytes + (2 * n * k if way == "widen alone" else 0)) / ms / 1e6
            results.append({**line, "format": format, "way": way, "ms": ms, "ratio": ms / base, "GB/s": rate})
            mark = "  SLOWER than bf16" if way == "ours" and ms > 1.1 * base else ""
            print(f"    {format} {way:<24}{ms:.4f} ms  {ms / base:5.2f}  {rate:6.0f} GB/s{mark}", flush=True)
    return results


def shared_memory() -> int:
    return gpu.card(torch.cuda.current_device())[1] - gpu.KEPT


def time_ways(options: argparse.Namespace, results: list[dict], save: Callable[[], None]) -> None:
    for shape in options.shapes:
        n, k = SHAPES[shape]
        weights = {format: copies(packed(n, k, format)) for format in options.formats}
        plain = [torch.randn(n, k, device="cuda").to(BF16) for _ in range(max(2, min(8, 160_000_000 // (2 * n * k))))]
        xs = [torch.zeros(rows, k, device="cuda", dtype=BF16) for rows in options.rows]
        side_by_side([partial(linear, x, several[0]) for several in weights.values() for x in xs])
        for i, rows in enumerate(options.rows):
            results += time_rows(shape, rows, weights, plain, options.ways, i == 0)
            save()
            torch.cuda.empty_cache()


def sweep(options: argparse.Namespace, results: list[dict], save: Callable[[], None]) -> None:
    """Every candidate of every format at some numbers of rows; the best three of each, and the best splits of them."""
    for shape in options.shapes:
        several = {format: copies(packed(*SHAPES[shape], format)) for format in options.formats}
        for rows in options.swept_rows:
            for format, weights in several.items():
                results += sweep_rows(shape, format, weights, rows)
                save()
    print_best(results)


def print_best(results: list[dict]) -> None:
    """By format and rows the tile whose time, relative to the fastest of each shape, is the smallest on average."""
    print("the best tiles over all shapes:")
    keys = dict.fromkeys((row["format"], row["rows"]) for row in results)
    for format, rows in keys:
        found = [row for row in results if (row["format"], row["rows"]) == (format, rows)]
        fastest = {shape: min(r["ms"] for r in found if r["shape"] == shape) for shape in {r["shape"] for r in found}}
        ratios: dict[str, list[float]] = {}
        for row in found:
            ratios.setdefault(row["tile"], []).append(row["ms"] / fastest[row["shape"]])
        whole = {tile: statistics.mean(r) for tile, r in ratios.items() if len(r) == len(fastest)}
        for tile in sorted(whole, key=whole.__getitem__)[:2]:
            print(f"    {format} {rows} rows: {whole[tile]:.3f}  {tile}", flush=True)


def sweep_rows(shape: str, format: str, several: list[PackedWeight], rows: int) -> list[dict]:
    x = torch.randn(rows, several[0].in_features, device="cuda").to(BF16)
    want = linear(x.float(), several[0])
    hopper = gpu.takes_hopper(x, several[0])
    tiles = dict.fromkeys(
        plan.fitting(format, 64, 2, shared_memory())
        for plan in plans.CANDIDATES
        if (rows <= plan.BB or plan.BB >= 128) and max(64 if plan.rows_first else 16, 2 * rows) >= plan.BB
        and not (format == "fp8" and plan.after) and (hopper or not plan.hopper)
    )  # fmt: skip

    def time_one(plan: plans.Product) -> float:
        return milliseconds([partial(gpu.in_registers, x, w, None, plan) for w in several])

    outputs = side_by_side([partial(gpu.in_registers, x, several[0], None, plan) for plan in tiles])
    made = dict(zip(tiles, outputs, strict=True))
    torch.cuda.synchronize()
    times: dict[plans.Product, float] = {}
    for plan, y in made.items():
        if not isinstance(y, Tensor):
            print(f"    {plan}: {str(y).splitlines()[0][:80]}")
            continue
        error = ((y.float() - want).norm() / want.norm()).item()
        if not error <= BOUND:
            print(f"    {plan}: WRONG, {error:.1e}")
            continue
        times[plan] = time_one(plan)
    best = sorted(times, key=times.__getitem__)[:3]
    others = [replace(plan, waves=waves) for plan in best for waves in plans.WAVES if waves != plan.waves]
    side_by_side([partial(gpu.in_registers, x, several[0], None, plan) for plan in others])
    times |= {plan: time_one(plan) for plan in others}
    ordered = sorted(times.items(), key=lambda item: item[1])
    ours = milliseconds([partial(linear, x, w) for w in several])
    widened = several[0].out_features * several[0].in_features * 2
    chosen = plans.product_of(format, BF16, 64, rows, shared_memory(), hopper, widened)
    print(f"{shape} {format} {rows} rows: chosen {chosen} {ours:.4f} ms", flush=True)
    for plan, ms in ordered[:3]:
        print(f"    {ms:.4f} ms  {several[0].nbytes / ms / 1e6:5.0f} GB/s  {plan}", flush=True)
    return [{"shape": shape, "format": format, "rows": rows, "tile": str(plan), "ms": ms} for plan, ms in ordered]


# -- whole prompts -----------------------------------------------------------------------------------------------------


def read_prompt(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return prefill(model, ids, model.backbone.new_cache(len(ids)))


@torch.no_grad()
def time_prompts(options: argparse.Namespace, results: list[dict], save: Callable[[], None]) -> None:
    for name in options.models:
        for format in ("bf16", *options.formats):
            torch.manual_seed(0)
            with torch.device("cuda"):
                model = mambakit.MambaForCausalLM(mambakit.MambaConfig(**MODELS[name]))
            model = model.to(BF16).eval()
            if format != "bf16":
                model.quantize(format)
            for b, length in options.prompts:
                ids = torch.randint(0, 50000, (b, length), device="cuda")
                read = partial(read_prompt, model, ids)
                for _ in range(3):  # compiled, captured
                    read()
                times = []
                for _ in range(7):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    read()
                    end.record()
                    end.synchronize()
                    times.append(begin.elapsed_time(end))
                ms = statistics.median(times)
                results.append({"model": name, "format": format, "batch": b, "length": length, "ms": ms})
                print(f"{name} {format:<5} {b} x {length}: {ms:.2f} ms", flush=True)
                save()
            del model
            torch.cuda.empty_cache()


def prompt(text: str) -> tuple[int, int]:
    batch, length = map(int, text.split("x"))
    return batch, length


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("products", "prompts", "none"), default=["products"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--formats", nargs="+", choices=SCALED, default=list(SCALED))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--sweep", action="store_true", help="time the candidate tiles, too")
    parser.add_argument("--swept-rows", nargs="+", type=int, default=list(SWEPT_ROWS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1.4b"])
    parser.add_argument("--prompts", nargs="+", type=prompt, default=PROMPTS, metavar="BATCHxLENGTH")
    record.add_argument(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU is here; the kernels run interpreted in tests/ops/linear/test_triton.py")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    torch.manual_seed(0)
    began = time.perf_counter()
    if red := wrong():
        sys.exit("\n".join(["WRONG, not timed:", *red]))
    print(f"all products are right ({time.perf_counter() - began:.0f} s)", flush=True)
    results: dict[str, list[dict]] = {}

    def save() -> None:
        record.write(options.json, results, gpus=1)

    for name, chosen, measure in (
        ("products", "products" in options.parts, time_ways), ("tiles", options.sweep, sweep),
        ("prompts", "prompts" in options.parts, time_prompts),
    ):  # fmt: skip
        if chosen:
            results[name] = []
            measure(options, results[name], save)


if __name__ == "__main__":
    main()
