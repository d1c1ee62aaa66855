"""Check and time the selective scan on one NVIDIA GPU.

    python benchmarks/gpu_ops.py                   # check, then the table
    python benchmarks/gpu_ops.py --sweep           # and other layouts than the ones plan.py chooses
    python benchmarks/gpu_ops.py --json out.json

A scan that is wrong is not timed. `ms` is the median of CUDA-graph replays between CUDA events (no launch gaps),
`eager` the same calls launched one by one. Data is random, with a trained model's step sizes (0.001 to 0.1) and A = -1
.. -16. An element is one (b, l, d). The floor is the special-function unit: forward 20 operations per element (16
exponentials, softplus, the gate), 4.0e12 per second measured on an H100, so 200 G elements per second; forward +
backward at least twice the exponentials and the gates again, 40. `peer` is mamba-ssm's CUDA extension: where it is
installed it is measured in this run, its errors too; else RECORDED at commit e9594ce on the same kind of card on
2026-11-23.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import math
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from mambakit.ops.selective_scan import chunked, cuda, cuda_backward, cuda_forward
from mambakit.ops.selective_scan import plan as plans
from mambakit.ops.selective_scan.schema import CHECKPOINT_INTERVAL
from tests.ops.selective_scan import test_cuda

SPECIAL = 4.0e12
OPERATIONS = {"forward": 20, "both": 40}
# (b, d, l): mamba-ssm's milliseconds forward, forward + backward
SHAPES = {
    (16, 1536, 2048): (0.883, 4.505),
    (8, 4096, 2048): (1.167, 5.942),
    (4, 5120, 4096): (1.444, 7.422),
    (1, 4096, 32768): (3.042, 13.326),
    (1, 1536, 131072): (4.343, 19.833),
    (1, 1024, 2048): (0.050, 0.440),
    (1, 1024, 524288): (11.603, 57.522),
    (64, 1536, 512): (0.793, 4.018),
}
INTERVAL = CHECKPOINT_INTERVAL
PEER = "selective_scan_cuda"  # mamba-ssm's extension
RESULTS: list[dict] = []
WORST: list[dict] = []


class PeerScan:
    """mamba-ssm's forward and backward on our channels-last operands, laid out as it wants them beforehand."""

    def __init__(self, module, u, delta, A, B, C, D, z, delta_bias, softplus, dy):
        def turned(t):
            return t.transpose(1, 2).contiguous()

        self._module, self._softplus = module, softplus
        self._operands = [turned(u), turned(delta), A, turned(B)[:, None], turned(C)[:, None], D, turned(z), delta_bias]
        self._dy = turned(dy)

    def forward(self):
        """(b, d, l)"""
        return self._module.fwd(*self._operands, self._softplus)[2]

    def both(self):
        """Gradients of u, delta, A, B, C, D, delta_bias, z, in its layout."""
        out, x, _ = self._module.fwd(*self._operands, self._softplus)
        return self._module.bwd(*self._operands, self._dy, x, out, None, self._softplus, False)

    def results(self):
        """What both passes give, in our layout."""
        du, ddelta, dA, dB, dC, dD, dbias, dz = self.both()
        rows = {"y": self.forward(), "du": du, "ddelta": ddelta, "dB": dB.squeeze(1), "dC": dC.squeeze(1), "dz": dz}
        return {name: t.transpose(1, 2) for name, t in rows.items()} | {"dA": dA, "dD": dD, "dbias": dbias}


def inputs(b, d, length, n=16, dtype=torch.bfloat16):
    """(arguments of forward without the interval, dy)."""
    randn = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    step = torch.exp(torch.empty(d, device="cuda").uniform_(math.log(1e-3), math.log(1e-1)))
    bias = step + torch.log(-torch.expm1(-step))
    A = -torch.arange(1, n + 1, device="cuda", dtype=torch.float32).repeat(d, 1)
    u, z, dy = randn(b, length, d), randn(b, length, d), randn(b, length, d)
    delta, B, C = randn(b, length, d).mul_(0.5), randn(b, length, n), randn(b, length, n)
    return (u, delta, A, B, C, torch.ones(d, device="cuda"), z, bias, True, None, None), dy


def median(run, repeats):
    run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def replayed(run, repeats, inner):
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            run()
    return median(graph.replay, repeats) / inner


def time_shape(shape, interval, variant="", kinds=("forward", "both"), repeats=20, eager=True, module=None):
    arguments, dy = inputs(*shape)
    theirs = None if module is None else PeerScan(module, *arguments[:9], dy)
    elements = shape[0] * shape[1] * shape[2]
    inner = 20 if elements < 1e7 else 1

    def forward():
        return cuda.forward(*arguments, 0)

    def both():
        _, _, checkpoints = cuda.forward(*arguments, interval)
        return cuda.backward(dy, None, *arguments, checkpoints, interval)

    for kind in kinds:
        run = {"forward": forward, "both": both}[kind]
        ms = replayed(run, repeats, inner)
        loose = median(lambda run=run: [run() for _ in range(inner)], repeats) / inner if eager else float("nan")
        source, their_ms = "recorded", SHAPES.get(shape, (float("nan"),) * 2)[kind == "both"]
        if theirs is not None:
            source, their_ms = "measured", replayed(getattr(theirs, kind), repeats, inner)
        rate = elements / ms * 1e3
        share = rate * OPERATIONS[kind] / SPECIAL
        RESULTS.append({"shape": shape, "kind": kind, "variant": variant, "ms": ms, "eager_ms": loose,
                        "elements_per_s": rate, "share_of_floor": share, f"{source}_peer_ms": their_ms})  # fmt: skip
        print(f"{'x'.join(map(str, shape)):<15}{kind:<8}{variant:<30}{ms:8.4f} ms  eager {loose:8.4f}  "
        f"{rate / 1e9:6.1f} G/s  "
              f"{share:4.0%} of floor  {source} peer {their_ms:7.3f}  {their_ms / ms:5.2f}x", flush=True)  # fmt: skip


def compare_errors(module, interval):
    """bfloat16 errors of both on the same inputs, from the float64 chunked."""
    worse = []
    for shape in ((2, 1000, 256), (1, 4096, 64), (3, 333, 512)):
        b, length, d = shape
        arguments, dy = inputs(b, d, length)
        wide = [t.double() if torch.is_tensor(t) else t for t in arguments]
        y, _, checkpoints = chunked.forward(*wide, interval)
        names = ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "dbias")
        exact = {"y": y} | dict(
            zip(names, chunked.backward(dy.double(), None, *wide, checkpoints, interval), strict=False)
        )
        y, _, checkpoints = cuda.forward(*arguments, interval)
        ours = {"y": y} | dict(zip(names, cuda.backward(dy, None, *arguments, checkpoints, interval), strict=False))
        theirs = PeerScan(module, *arguments[:9], dy).results()
        for name, e in exact.items():
            mine, his = (float((t[name].double() - e).norm() / e.norm()) for t in (ours, theirs))
            RESULTS.append({"shape": shape, "error": name, "ours": mine, "peer": his})
            worse += [name] if mine > 1.05 * his else []
            print(f"  error of {name:<7} {'x'.join(map(str, shape)):<12} ours {mine:.2e}  peer {his:.2e}", flush=True)
    print(f"  larger than the peer's: {', '.join(worse) or 'none'}")


def check(cases):
    red = {}
    worst: dict[str, float] = {}
    for case in cases:
        torch.cuda.empty_cache()
        try:
            found = test_cuda.errors(case)
        except Exception as error:  # a check that raises is a red check, whatever it raises
            red[test_cuda.name_of(case)] = repr(error)[:300]
            if "CUDA" in repr(error) or "launch" in repr(error):
                break
            continue
        wrong = test_cuda.failures(case, found)
        if wrong:
            red[test_cuda.name_of(case)] = {k: f"{v:.1e}" for k, v in wrong.items()}
        for name, error in found.items():
            key = f"{str(case[4])[6:]} {name}"
            worst[key] = max(worst.get(key, 0.0), error)
    for name, error in sorted(worst.items()):
        print(f"  {name:<20}{error:.1e}")
        WORST.append({"what": name, "error": error})
    for name, what in red.items():
        print(f"  RED {name}: {what}")
    return not red


def sweep(interval):
    """Other layouts than the chosen ones, and other numbers of chunks where a row is cut."""
    chosen = cuda_forward.forward_plan, cuda_backward.backward_plan
    for layout in FORWARD_LAYOUTS:
        for shape in SHAPES:
            tiles = shape[0] * -(-shape[1] // layout.cta_channels)
            for chunks in [1] if tiles > 200 else [132 * waves // tiles + 1 for waves in (2, 3, 4, 8, 16)]:
                plan = layout._replace(chunks=chunks)
                cuda_forward.forward_plan = lambda *_, plan=plan: plan
                cuda_forward.forward_kernel.cache_clear()
                time_shape(shape, interval, describe(plan), ("forward",), 5, eager=False)
    cuda_forward.forward_plan = chosen[0]
    cuda_forward.forward_kernel.cache_clear()
    for layout in BACKWARD_LAYOUTS:
        for shape in SWEEP_BACKWARD:
            tiles = shape[0] * -(-shape[1] // layout.cta_channels)
            for chunks in [1] if tiles > 200 else [132 * waves // tiles for waves in (2, 3, 6, 9)]:
                plan = layout._replace(chunks=chunks)
                cuda_backward.backward_plan = lambda *_, plan=plan: plan
                cuda_backward.backward_kernel.cache_clear()
                time_shape(shape, interval, describe(plan), ("both",), 4, eager=False)
    cuda_backward.backward_plan = chosen[1]
    cuda_backward.backward_kernel.cache_clear()


def sweep_chained(interval):
    """Rows that fill the card unevenly: in a CTA each, as plan.py chooses, and as chained scans of other layouts."""
    modules = {"forward": cuda_forward, "backward": cuda_backward}

    def time(kind, variant, choose):
        setattr(modules[kind], f"{kind}_plan", choose)
        getattr(modules[kind], f"{kind}_kernel").cache_clear()
        time_shape(shape, interval, variant, ("forward" if kind == "forward" else "both",), 5, eager=False)

    for kind, shape in itertools.product(("forward", "backward"), UNEVEN):
        b, d, _ = shape
        chosen = getattr(plans, f"{kind}_plan")
        time(kind, "whole rows", lambda *given, chosen=chosen: chosen(*given[:-1], False))
        time(kind, "chosen", chosen)
        layouts = [BACKWARD_LAYOUTS[1]]
        if kind == "forward":
            layouts = [layout.plan for layout in plans._LAYOUTS]
            layouts += [layouts[0]._replace(min_ctas=6, round=tokens) for tokens in (16, 32)]
        for layout, resident, chunks in itertools.product(layouts, (2, 4, 6), (4, 8, 16)):
            most = layout.min_ctas - (kind == "forward")  # more are not resident, or are all whole rows
            if resident <= most and resident * 132 < b * -(-d // layout.cta_channels):
                plan = layout._replace(chunks=chunks, resident=resident)
                time(kind, describe(plan), lambda *_, plan=plan: plan)
        time(kind, "chosen, again", chosen)


def describe(plan):
    return "{}x{}x{} {}w /{} {}c r{} {}/{}/{} {}".format(*plan)


FORWARD_LAYOUTS = [
    *(plans.Plan(2, 8, 1, 2, 8, 1, round=tokens) for tokens in (8, 16, 32)),
    *(plans.Plan(2, 8, 1, 2, blocks, 1, round=16) for blocks in (4, 6)),
    plans.Plan(2, 8, 1, 4, 4, 1, round=16),
    plans.Plan(2, 8, 1, 1, 16, 1, round=16),
    *(plans.Plan(1, 16, 1, 2, blocks, 1, round=16) for blocks in (4, 5, 6, 7)),
    plans.Plan(1, 16, 1, 2, 8, 1, round=8),
    plans.Plan(1, 16, 1, 4, 3, 1, round=16),
    plans.Plan(1, 16, 1, 1, 12, 1, round=16),
    plans.Plan(4, 4, 2, 4, 4, 1, round=16),
    *(plans.Plan(4, 4, 1, 4, 6, 1, round=tokens) for tokens in (16, 32)),
]
BACKWARD_LAYOUTS = [
    plans.Plan(4, 4, 2, 4, 3, 1, segment=64, sub=4),
    plans.Plan(4, 4, 2, 4, 2, 1, segment=64, sub=4, save=4),
    plans.Plan(4, 4, 2, 4, 3, 1, segment=32, sub=4, save=4),  # worth it with --interval 32 alone, as those below
    plans.Plan(4, 4, 2, 4, 4, 1, segment=16, sub=2, save=4),
    plans.Plan(4, 4, 2, 4, 4, 1, segment=32, sub=2),
    plans.Plan(4, 4, 2, 2, 6, 1, segment=32, sub=4, save=4),
]
UNEVEN = [
    (4, 5120, 4096),
    (12, 1536, 2048),
    (20, 1536, 2048),
    (24, 1536, 2048),
    (10, 2048, 1024),
    (6, 4096, 2048),
    (3, 5120, 2048),
]
SWEEP_BACKWARD = [(16, 1536, 2048), (8, 4096, 2048), (1, 4096, 32768), (1, 1024, 2048)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time other layouts too")
    parser.add_argument("--chained", action="store_true", help="time chained scans of other layouts too")
    parser.add_argument("--quick", action="store_true", help="check every fourth case only")
    parser.add_argument("--interval", type=int, default=INTERVAL, help="tokens between checkpoints")
    record.add_argument(parser)
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    installed = importlib.util.find_spec(PEER) is not None
    module = importlib.import_module(PEER) if installed else None
    green = check(test_cuda.CASES[:: 4 if options.quick else 1])
    if green:
        if module is not None:
            compare_errors(module, options.interval)
        for shape in SHAPES:
            time_shape(shape, options.interval, module=module)
        if options.sweep:
            sweep(options.interval)
        if options.chained:
            sweep_chained(options.interval)
    else:
        print("selective_scan: WRONG, not timed")
    parts = {
        "scan": [row for row in RESULTS if "kind" in row],
        "peer_errors": [row for row in RESULTS if "error" in row],
    }
    record.write(options.json, {**parts, "worst_errors": WORST}, gpus=1)
    raise SystemExit(0 if green else 1)


if __name__ == "__main__":
    main()
