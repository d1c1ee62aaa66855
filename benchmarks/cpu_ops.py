"""The CPU kernels one by one: a prefill's scan and convolution, and products of a few rows in every weight format.

    python benchmarks/cpu_ops.py                # one thread
    python benchmarks/cpu_ops.py --threads 2

Random data; the contenders in turn, the best of all rounds (a shared machine's speed drifts). Each is first checked
against plain PyTorch. The products' weights (512 x 768) stay in the caches, so that arithmetic is timed and not memory.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from mambakit.ops import causal_conv1d_, selective_scan_
from mambakit.ops._backends import native
from mambakit.ops.causal_conv1d import chunked as conv_reference
from mambakit.ops.linear import cpu as matvec
from mambakit.ops.linear import pack
from mambakit.ops.linear.lossless import DTYPES
from mambakit.ops.selective_scan import chunked as scan_reference


def best_seconds(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def close(got: torch.Tensor, want: torch.Tensor, bound: float, name: str) -> None:
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error < bound, f"{name} is {error:.1e} from its reference: nothing is timed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    record.add_argument(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print("native:", native.describe()["isa"], "threads:", options.threads)
    length, d, n, k = 512, 1536, 16, 4
    u, delta, z = (torch.randn(1, length, d) for _ in range(3))
    B, C = torch.randn(1, length, n), torch.randn(1, length, n)
    A, D, bias, weight = -16 * torch.rand(d, n), torch.ones(d), torch.rand(d) * 4 - 6, torch.randn(d, k)
    scan = (u, delta, A, B, C, D, z, bias, True)
    conv = (u, weight, bias, "silu")
    with torch.no_grad():
        state, window = torch.zeros(1, d, n), torch.zeros(1, d, k - 1)
        wide = [t.double() if isinstance(t, torch.Tensor) else t for t in scan]
        close(selective_scan_(*scan, state=state)[0], scan_reference.forward(*wide, None, None, 0)[0], 1e-5, "the scan")
        wide = [t.double() if isinstance(t, torch.Tensor) else t for t in conv]
        close(
            causal_conv1d_(*conv, state=window)[0],
            conv_reference.forward(*wide, None, None)[0],
            1e-5,
            "the convolution",
        )
        times = best_seconds(
            {
                "selective_scan": lambda: selective_scan_(*scan, state=state),
                "causal_conv1d": lambda: causal_conv1d_(*conv, state=window),
            },
            options.rounds,
        )
    ops = [{"op": name, "length": length, "d": d, "seconds": seconds} for name, seconds in times.items()]
    for name, seconds in times.items():
        print(f"{name} {length} x {d}: {seconds * 1e3:.2f} ms, {seconds * 1e9 / (length * d):.2f} ns an element")

    out, columns, repeats, products = 512, 768, 10, []
    kernel = native.kernel("linear")
    print(f"products, weights {out} x {columns} in the caches: G weights/s by rows of x")
    for format in matvec.KINDS:
        packed = pack(torch.randn(out, columns).to(DTYPES.get(format, torch.float32)), format)
        line = f"  {format:<12}"
        for rows in (1, 4, 16):
            x, y = torch.randn(rows, columns), torch.zeros(rows, out)
            call, kind = matvec.arguments(x, packed, None, y), ctypes.c_int64(matvec.KINDS[format])

            def run(call=call, kind=kind) -> None:
                for _ in range(repeats):
                    kernel(ctypes.byref(call), kind)

            run()
            close(y, x.double() @ packed.dequantized().double().T, 1e-4, format)
            seconds = best_seconds({"": run}, options.rounds)[""] / repeats
            products.append({"format": format, "rows": rows, "weights_per_second": out * columns / seconds})
            line += f"  {rows}: {out * columns / seconds / 1e9:6.2f}"
        print(line)
    record.write(options.json, {"ops": ops, "products": products}, gpus=0)


if __name__ == "__main__":
    main()
