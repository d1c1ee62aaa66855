"""What operands of other layouts cost the scan and the convolution, beside channels-last ones with one B and C.

    python benchmarks/layouts.py                       # a CPU, one thread
    python benchmarks/layouts.py --device cuda         # one NVIDIA GPU
    python benchmarks/layouts.py --device cuda --json out.json

Operands: transposed views of (b, d, l) memory, groups of channels of B and C, constants of them, mixed dtypes; and what
one would do without: copies to channels-last and back, a scan for each group. Each case is first checked against
float64 and not timed where it is wrong. Data is random. On a GPU times are medians of CUDA-graph replays (no launch
gaps), on a CPU the best of all rounds, the cases in turn; `x` is relative to channels-last in the same run.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from mambakit.ops.causal_conv1d import chunked as conv_plain
from mambakit.ops.selective_scan import chunked as scan_plain
from mambakit.ops.selective_scan.schema import CHECKPOINT_INTERVAL

# b, d, l, n, groups
SHAPES = {
    "cpu": [(2, 384, 1024, 16, 4), (2, 384, 1024, 1, 4)],
    "cuda": [
        (16, 1536, 2048, 16, 4),
        (64, 384, 197, 16, 1),
        (8, 192, 4096, 16, 4),
        (32, 384, 3136, 1, 4),
        (4, 1536, 2048, 16, 4),
    ],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPS = torch.ops.mambakit


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def scan_cases(b, d, length, n, groups, dtype, device) -> dict[str, tuple[tuple, torch.Tensor]]:
    """(arguments up to delta_softplus, the gradient of y) of each case."""
    randn = lambda *shape: torch.randn(*shape).to(device, dtype)  # noqa: E731
    A = -torch.arange(1, n + 1).repeat(d, 1).float().to(device)
    D, bias = torch.ones(d, device=device), (torch.rand(d) * 4 - 6).to(device)
    u, delta, z, dy = randn(b, length, d), randn(b, length, d) * 0.5, randn(b, length, d), randn(b, length, d)
    rows = randn(b, length, n), randn(b, length, n)
    grouped = randn(b, length, groups, n), randn(b, length, groups, n)
    constant = randn(1, 1, d, n), randn(1, 1, d, n)

    def case(B, C, layout=lambda x: x, delta=delta):
        return (layout(u), layout(delta), A, B, C, D, layout(z), bias, True), layout(dy)

    cases = {"channels last": case(*rows), "(b, d, l)": case(*rows, transposed)}
    if groups > 1:
        cases |= {f"{groups} groups": case(*grouped), f"{groups} groups, (b, d, l)": case(*grouped, transposed)}
    cases["constants"] = case(*constant)
    if dtype != torch.float32:
        cases["float32 delta"] = case(*rows, delta=delta.float())
    return cases


def scan_forward(arguments, interval=0):
    return OPS.selective_scan(*arguments, None, None, interval)


def scan_both(arguments, dy):
    checkpoints = scan_forward(arguments, CHECKPOINT_INTERVAL)[2]
    return OPS.selective_scan_backward(dy, None, *arguments, None, None, checkpoints, CHECKPOINT_INTERVAL)


def copied(run, arguments, dy):
    """As one would do without strides: operands to channels-last, what comes out back again."""
    dense = [x.contiguous() if torch.is_tensor(x) and x.dim() == 3 else x for x in arguments]
    found = run(dense) if dy is None else run(dense, dy.contiguous())
    return [transposed(x) for x in found if torch.is_tensor(x) and x.shape == arguments[0].shape]


def each_group(arguments, groups):
    """A scan for each group."""
    u, delta, A, B, C, D, z, bias, softplus = arguments
    width = u.shape[2] // groups
    for i in range(groups):
        part = slice(i * width, (i + 1) * width)
        operands = u[..., part], delta[..., part], A[part], B[:, :, i], C[:, :, i], D[part], z[..., part], bias[part]
        scan_forward((*operands, softplus))


def conv_forward(arguments):
    return OPS.causal_conv1d(*arguments, "silu", None, None)


def conv_both(arguments, dy):
    conv_forward(arguments)
    return OPS.causal_conv1d_backward(dy, None, *arguments, "silu", None, None)


def error(found, expected) -> float:
    """The largest relative error of the results."""
    worst = 0.0
    for got, want in zip(found, expected, strict=True):
        if want.numel():
            worst = max(worst, float((got.double() - want).norm() / want.norm().clamp(min=1e-30)))
    return worst


def check(name, forward, both, plain_forward, plain_both, arguments, dy) -> bool:
    """Of two rows and few tokens, so that float64 takes little time."""
    length = arguments[0].shape[1]

    def cut(x):
        if not torch.is_tensor(x) or x.dim() < 3 or x.shape[1] != length:
            return x
        part = x[:2, :99]
        return transposed(part) if x.dim() == 3 and x.stride(2) != 1 else part.contiguous()

    small, gradient = [cut(x) for x in arguments], cut(dy)
    wide = [x.double() if torch.is_tensor(x) else x for x in small]
    found = (forward(small)[0], *both(small, gradient))
    off = error(found, (plain_forward(wide)[0], *plain_both(wide, gradient.double())))
    half = any(torch.is_tensor(x) and x.dtype == torch.bfloat16 for x in small)
    limit = 4e-3 if half else 1e-5  # a result is rounded to bfloat16, which alone is 1.7e-3
    if not off < limit:
        print(f"  RED {name}: {off:.1e}")
    return off < limit


def replayed(run: Callable[[], object], repeats: int = 20) -> float:
    """Milliseconds of a CUDA-graph replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def timed(runs: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Milliseconds of each."""
    if device == "cuda":
        return {name: replayed(run) for name, run in runs.items()}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            best[name] = min(best[name], (time.perf_counter() - begin) * 1e3)
    return best


def plain_scan(arguments):
    return scan_plain.forward(*arguments, None, None, 0)


def plain_scan_both(arguments, dy):
    return scan_plain.backward(dy, None, *arguments, None, None, None, CHECKPOINT_INTERVAL)


def plain_conv(arguments):
    return conv_plain.forward(*arguments, "silu", None, None)


def plain_conv_both(arguments, dy):
    return conv_plain.backward(dy, None, *arguments, "silu", None, None)


def measure(shape, dtype, device, rounds) -> tuple[bool, dict[tuple[str, str], dict[str, float]]]:
    """Whether all is right, and (op, "forward" or "both") -> milliseconds of each case."""
    b, d, length, _, groups = shape
    scans = scan_cases(*shape, dtype, device)
    x, dy = torch.randn(b, length, d).to(device, dtype), torch.randn(b, length, d).to(device, dtype)
    filters = torch.randn(d, 4).to(device), torch.randn(d).to(device)
    convs = {"channels last": ((x, *filters), dy), "(b, d, l)": ((transposed(x), *filters), transposed(dy))}
    of_scan = scan_forward, scan_both, plain_scan, plain_scan_both
    of_conv = conv_forward, conv_both, plain_conv, plain_conv_both
    good = [check(f"scan {shape} {case}", *of_scan, *given) for case, given in scans.items()]
    good += [check(f"conv {shape} {case}", *of_conv, *given) for case, given in convs.items()]
    if not all(good):
        return False, {}
    runs = {
        ("scan", "forward"): {case: functools.partial(scan_forward, given[0]) for case, given in scans.items()},
        ("scan", "both"): {case: functools.partial(scan_both, *given) for case, given in scans.items()},
        ("conv", "forward"): {case: functools.partial(conv_forward, given[0]) for case, given in convs.items()},
        ("conv", "both"): {case: functools.partial(conv_both, *given) for case, given in convs.items()},
    }
    other = scans["(b, d, l)"]
    runs["scan", "forward"]["(b, d, l), copied"] = functools.partial(copied, scan_forward, other[0], None)
    runs["scan", "both"]["(b, d, l), copied"] = functools.partial(copied, scan_both, *other)
    if groups > 1:
        grouped = scans[f"{groups} groups"][0]
        runs["scan", "forward"][f"{groups} scans"] = functools.partial(each_group, grouped, groups)
    return True, {kind: timed(cases, device, rounds) for kind, cases in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--rounds", type=int, default=20, help="of a CPU")
    parser.add_argument("--shapes", type=int, help="only the first so many")
    record.add_argument(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, results, green = options.device, [], True
    print(torch.cuda.get_device_name() if device == "cuda" else f"CPU, threads: {options.threads}", flush=True)
    for shape, (name, dtype) in itertools.product(SHAPES[device][: options.shapes], DTYPES.items()):
        right, found = measure(shape, dtype, device, options.rounds)
        green &= right
        for (op, kind), times in found.items():
            for case, ms in times.items():
                ratio = ms / times["channels last"]
                row = {"op": op, "shape": shape, "dtype": name, "kind": kind, "case": case, "ms": ms, "ratio": ratio}
                results.append(row)
                print(
                    f"{op:<5}{'x'.join(map(str, shape)):<19}{name:<9}{kind:<8}{case:<22}{ms:9.3f} ms {ratio:6.2f} x",
                    flush=True,
                )
        record.write(options.json, {"layouts": results}, gpus=1 if device == "cuda" else 0)
    raise SystemExit(0 if green else 1)


if __name__ == "__main__":
    main()
