"""Products of packed weights on one NVIDIA GPU, at every number of rows: check, then time every way beside bfloat16.

    python benchmarks/packed_products.py                                   # check, then the table of ways
    python benchmarks/packed_products.py --sweep                           # and every candidate tile, best first
    python benchmarks/packed_products.py --parts prompts --models 1.4b 7b  # whole prompts, bfloat16 beside each format

What is wrong is not timed. `ms` is the median of CUDA-graph replays over rotating weights, so that they come from
memory; x is bfloat16. The ways, for weights of the layers of a 1.4b and a 7B model:

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
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
SWEPT_ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
MODELS = {
    "1.4b": {"hidden_size": 2048, "num_hidden_layers": 48},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 65024},
}
PROMPTS = ((1, 128), (1, 512), (1, 2048), (4, 2048), (8, 2048))
BOUND = 8e-3  # of a bfloat16 product: weights and the result are rounded
FLOAT8_BOUND = 4e-2  # x is rounded to 4 bits


# -- correctness -------------------------------------------------------------------------------------------------------


def wrong() -> list[str]:
    """What differs from float64 by more than it may."""
    found = []

    def expect(name: str, got: Tensor, want: Tensor, bound: float) -> None:
        error = ((got.double() - want).norm() / want.norm()).item()
        if not error <= bound:
            found.append(f"{name}: {error:.1e}, more than {bound:g}")

    for dtype in (BF16, torch.float16):
        for plan in (plans.Product(64, 32, 64, 4, 3, after=True), plans.Product(32, 16, 128, 4, 3, after=True)):
            for name, weight in every_number().items():  # exactly, one number at a time
                fitted = plan.fitting(name, weight.group, 2, 200 << 10)
                eye = torch.eye(weight.in_features, dtype=dtype, device="cuda")
                got = gpu.in_registers(eye, weight, None, fitted).T
                if not torch.equal(got, weight.dequantized().to(dtype)):
                    found.append(f"{name} in {dtype}: a number is not exact ({plan})")
    for format in SCALED:
        for group in (32, 64, 128) if format != "fp8" else (64,):
            for n, k in ((1000, 520), (144, 4096), (512, 1088)):
                weight = packed(n, k, format, group)
                exact, bias = weight.dequantized().double(), torch.randn(n, device="cuda")
                for rows in (1, 5, 16, 33, 100, 257, 700):
                    x = torch.randn(rows, k, device="cuda").to(BF16)
                    want = x.double() @ exact.T + bias.double()
                    rounded = format == "fp8" and plans.takes_float8(BF16, rows, n, k)
                    name = f"{format} {group} {rows} x {n} x {k}"
                    expect(name, linear(x, weight, bias), want, FLOAT8_BOUND if rounded else BOUND)
                    expect(f"{name} float32", linear(x.float(), weight, bias), want, 1e-5)
                    expect(f"{name} slabs", gpu.widened(x, weight, bias, 256 * k * 2), want, BOUND)
                    if rows in (5, 100):
                        for plan in plans.CANDIDATES[:: 5 if group == 64 else 25]:
                            fitted = plan.fitting(format, group, 2, 220 << 10)
                            expect(f"{name} {fitted}", gpu.in_registers(x, weight, bias, fitted), want, BOUND)
        x = torch.randn(64, 2048, device="cuda").to(BF16)
        weight, norm = packed(2048, 2048, format, 64), torch.rand(2048, device="cuda")
        y, kept = mambakit.ops.linear.normed_linear(x, norm, weight, residual=x.float())
        exact_sum = 2 * x.double()
        normed = exact_sum * torch.rsqrt(exact_sum.square().mean(1, keepdim=True) + 1e-5) * norm.double()
        expect(f"{format} norm", y, normed @ weight.dequantized().double().T, FLOAT8_BOUND if format == "fp8" else 1e-2)
        expect(f"{format} residual", kept, exact_sum, 1e-6)
    return found


def every_number() -> dict[str, PackedWeight]:
    """Weights with each number of a format, scales 1."""
    q8 = torch.arange(-128, 128, device="cuda").to(torch.int8).repeat(64, 1)
    q4 = torch.arange(-8, 8, device="cuda").to(torch.int8).repeat(64, 16)
    e4m3 = torch.arange(256, device="cuda").to(torch.uint8)
    e4m3[(e4m3 & 127) == 127] = 0  # no NaN
    ones = torch.ones(64, 4, device="cuda")
    from mambakit.ops.linear.packed import pack_integers

    return {
        "int8": pack_integers(q8, ones, "int8", 64), "int4": pack_integers(q4, ones, "int4", 64),
        "fp8": PackedWeight("fp8", e4m3.repeat(64, 1), ones[:, :1].contiguous(), 256),
    }  # fmt: skip


def packed(n: int, k: int, format: str, group: int = 64) -> PackedWeight:
    return pack(torch.randn(n, k, device="cuda") / k**0.5, format, group)


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


def time_rows(shape: str, rows: int, weights: dict[str, list[PackedWeight]], plain: list[Tensor], first: bool):
    """Every way of one number of rows."""
    n, k = SHAPES[shape]
    x = torch.randn(rows, k, device="cuda").to(BF16)
    base = milliseconds([partial(torch.mm, x, w.T) for w in plain])
    line = {"shape": shape, "rows": rows}
    results: list[dict] = [{**line, "format": "bf16", "way": "bf16", "ms": base, "ratio": 1.0}]
    print(f"{shape:<14}{rows:>6} rows  bf16 {base:.4f} ms", flush=True)
    for format, several in weights.items():
        ways: dict[str, list[Callable[[], object]]] = {"ours": [partial(linear, x, w) for w in several]}
        tile = next(product for most, product in plans.PRODUCTS[format] if rows <= most)
        tile = tile.fitting(format, 64, 2, shared_memory())
        if rows <= 4096:
            ways["registers"] = [partial(gpu.in_registers, x, w, None, tile) for w in several]
        for slab in plans.SLABS if rows >= 64 else ():
            if slab < n * k * 2:
                name = f"widen, slab {slab >> 20}" if slab else "widen"
                ways[name] = [partial(gpu.widened, x, w, None, slab) for w in several]
        if first:
            memory = torch.empty(n, k, dtype=BF16, device="cuda")
            ways["widen alone"] = [partial(gpu.widen_into, memory, w) for w in several]
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


def time_ways(options: argparse.Namespace) -> list[dict]:
    results: list[dict] = []
    for shape in options.shapes:
        n, k = SHAPES[shape]
        weights = {format: copies(packed(n, k, format)) for format in options.formats}
        plain = [torch.randn(n, k, device="cuda").to(BF16) for _ in range(max(2, min(8, 160_000_000 // (2 * n * k))))]
        for i, rows in enumerate(options.rows):
            results += time_rows(shape, rows, weights, plain, i == 0)
            torch.cuda.empty_cache()
    return results


def sweep(options: argparse.Namespace) -> list[dict]:
    """Every candidate of every format at some numbers of rows; the best three of each, and the best splits of them."""
    results: list[dict] = []
    for shape in options.shapes:
        for format in options.formats:
            several = copies(packed(*SHAPES[shape], format))
            for rows in options.swept_rows:
                results += sweep_rows(shape, format, several, rows)
    return results


def sweep_rows(shape: str, format: str, several: list[PackedWeight], rows: int) -> list[dict]:
    x = torch.randn(rows, several[0].in_features, device="cuda").to(BF16)
    want = linear(x.float(), several[0])
    tiles = dict.fromkeys(
        plan.fitting(format, 64, 2, shared_memory())
        for plan in plans.CANDIDATES
        if (rows <= plan.BB or plan.BB >= 128) and max(16, 2 * rows) >= plan.BB
        and not (format == "fp8" and plan.after)
    )  # fmt: skip

    def compile_one(plan: plans.Product) -> Tensor | str:
        try:
            return gpu.in_registers(x, several[0], None, plan)
        except Exception as error:  # whatever the compiler says of a candidate
            return str(error).splitlines()[0][:80]

    def time_one(plan: plans.Product) -> float:
        return milliseconds([partial(gpu.in_registers, x, w, None, plan) for w in several])

    with ThreadPoolExecutor(16) as pool:  # compilation takes seconds each
        made = dict(zip(tiles, pool.map(compile_one, tiles), strict=True))
    torch.cuda.synchronize()
    times: dict[plans.Product, float] = {}
    for plan, y in made.items():
        if isinstance(y, str):
            print(f"    {plan}: {y}")
            continue
        error = ((y.float() - want).norm() / want.norm()).item()
        if not error <= BOUND:
            print(f"    {plan}: WRONG, {error:.1e}")
            continue
        times[plan] = time_one(plan)
    for plan in sorted(times, key=times.__getitem__)[:2]:
        for waves in set(plans.WAVES) - {plan.waves}:
            other = replace(plan, waves=waves)
            times[other] = time_one(other)
    ordered = sorted(times.items(), key=lambda item: item[1])
    ours = milliseconds([partial(linear, x, w) for w in several])
    chosen = plans.product_of(format, BF16, 64, rows, shared_memory())
    print(f"{shape} {format} {rows} rows: chosen {chosen} {ours:.4f} ms", flush=True)
    for plan, ms in ordered[:3]:
        print(f"    {ms:.4f} ms  {several[0].nbytes / ms / 1e6:5.0f} GB/s  {plan}", flush=True)
    return [{"shape": shape, "format": format, "rows": rows, "tile": str(plan), "ms": ms} for plan, ms in ordered]


# -- whole prompts -----------------------------------------------------------------------------------------------------


def read_prompt(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return prefill(model, ids, model.backbone.new_cache(len(ids)))


@torch.no_grad()
def time_prompts(options: argparse.Namespace) -> list[dict]:
    results: list[dict] = []
    for name in options.models:
        for format in ("bf16", *options.formats):
            torch.manual_seed(0)
            with torch.device("cuda"):
                model = mambakit.MambaForCausalLM(mambakit.MambaConfig(**MODELS[name]))
            model = model.to(BF16).eval()
            if format != "bf16":
                model.quantize(format)
            for b, length in PROMPTS:
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
            del model
            torch.cuda.empty_cache()
    return results


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("products", "prompts"), default=["products"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--formats", nargs="+", choices=SCALED, default=list(SCALED))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--sweep", action="store_true", help="time the candidate tiles, too")
    parser.add_argument("--swept-rows", nargs="+", type=int, default=list(SWEPT_ROWS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1.4b"])
    record.add_argument(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU is here; the kernels run interpreted in tests/ops/linear/test_triton.py")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    torch.manual_seed(0)
    if red := wrong():
        sys.exit("\n".join(["WRONG, not timed:", *red]))
    print("all products are right", flush=True)
    results: dict[str, list[dict]] = {}
    if "products" in options.parts:
        results["products"] = time_ways(options)
    if options.sweep:
        results["tiles"] = sweep(options)
    if "prompts" in options.parts:
        results["prompts"] = time_prompts(options)
    record.write(options.json, results, gpus=1)


if __name__ == "__main__":
    main()
