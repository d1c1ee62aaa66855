"""Check and time causal_conv1d, rms_norm and linear_cross_entropy on one NVIDIA GPU.

    python benchmarks/gpu_conv_norm.py             # check, then the tables
    python benchmarks/gpu_conv_norm.py --sweep     # and every tile of the small tables in triton.py beside its rivals
    python benchmarks/gpu_conv_norm.py --json out.json

An op that is wrong is not timed. `ms` is the median of CUDA-graph replays, so it holds no launch gaps; `eager` is the
public function called in a loop, autograd included. Input sets rotate, so that large shapes are read from memory and
not from L2. GB/s counts each input read once and each output written once; the share is of 3.0 TB/s, an H100's copy.
`peer` is mamba-ssm's causal-conv1d 1.6.1 on the same card and shapes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from mambakit.ops.causal_conv1d import chunked as conv_reference
from mambakit.ops.causal_conv1d import triton as conv
from mambakit.ops.causal_conv1d.api import causal_conv1d
from mambakit.ops.linear_cross_entropy import chunked as head_reference
from mambakit.ops.linear_cross_entropy import triton as head
from mambakit.ops.linear_cross_entropy.api import linear_cross_entropy
from mambakit.ops.rms_norm import chunked as norm_reference
from mambakit.ops.rms_norm import triton as norm
from mambakit.ops.rms_norm.api import rms_norm

COPY = 3.0e12  # bytes per second
MATMUL = 790e12  # operations per second, bfloat16
# (b, d, l): causal-conv1d's milliseconds forward, forward + backward (bfloat16, k = 4, SiLU)
CONV = {
    (16, 1536, 2048): (0.090, 0.879),
    (8, 4096, 2048): (0.098, 0.611),
    (4, 5120, 4096): (0.120, 0.555),
    (1, 4096, 32768): (0.196, 0.497),
    (1, 1536, 131072): (0.292, 0.725),
    (1, 1024, 2048): (0.030, 0.458),
    (1, 1024, 524288): (0.836, 1.978),
    (64, 1536, 512): (0.095, 0.582),
}
NORM = [(32768, 768), (16384, 2048), (8192, 2560), (8192, 5120), (4096, 8192)]  # rows, h
HEAD = [(32768, 768, 50280), (8192, 2048, 50280)]  # tokens, h, v
RESULTS: list[dict] = []


def milliseconds(calls, repeats=30):
    """Median time of one of `calls`, replayed together from a CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _median(graph.replay, repeats) / len(calls)


def eager_milliseconds(calls, repeats=30):
    def loop():
        for call in calls:
            call()

    loop()
    return _median(loop, repeats) / len(calls)


def _median(run, repeats):
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


def sets(size):
    """How many input sets of `size` bytes to rotate among: four times an L2 of 50 MB, or 8 for small ones."""
    return max(1, min(8, -(-200_000_000 // size)))


def report(op, shape, variant, ms, size, eager=None, peer=None):
    rate = size / ms * 1e3
    RESULTS.append(
        {
            "op": op,
            "shape": shape,
            "variant": variant,
            "ms": ms,
            "GB/s": rate / 1e9,
            "share": rate / COPY,
            "eager_ms": eager,
            "peer_ms": peer,
        }
    )
    extra = "" if eager is None else f"  eager {eager:7.3f}"
    extra += "" if peer is None else f"  peer {peer:6.3f}  {peer / ms:5.2f}x"
    print(f"{op:<16}{'x'.join(map(str, shape)):<16}{variant:<24}{ms:8.4f} ms {rate / 1e9:6.0f} GB/s "
          f"{rate / COPY:5.0%}{extra}", flush=True)  # fmt: skip


def relative(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def exact(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def conv_inputs(b, d, length, dtype, device):
    x, dy = (torch.randn(b, length, d, device=device).to(dtype) for _ in range(2))
    return x, dy, torch.randn(d, 4, device=device), torch.randn(d, device=device)


def wrong_conv(device, shapes=((3, 200, 1001), (1, 1536, 2048))):
    worst = 0.0
    for shape, dtype, packed in itertools.product(shapes, (torch.float32, torch.bfloat16), (False, True)):
        x, dy, weight, bias = conv_inputs(*shape, dtype, device)
        length = shape[2]
        x, dy = (x.reshape(1, -1, shape[1]), dy.reshape(1, -1, shape[1])) if packed else (x, dy)
        cu = torch.tensor([0, 0, 1, length // 2, x.shape[1]], dtype=torch.int32, device=device) if packed else None
        state = torch.randn(4 if packed else shape[0], shape[1], 3, device=device).to(dtype)
        arguments = (x, weight, bias, "silu", state, cu)
        got = (*conv.forward(*arguments), *conv.backward(dy, state, *arguments))
        exactly = tuple(map(exact, arguments))
        want = (
            *conv_reference.forward(*exactly),
            *conv_reference.backward(exact(dy), exact(state), *exactly),
        )
        limit = 1e-5 if dtype == torch.float32 else 3e-3
        worst = max([worst, *(relative(g, w) / limit for g, w in zip(got, want, strict=True))])
    return worst


def time_conv(shapes, variant=""):
    for shape, (peer_forward, peer_both) in shapes.items():
        size = 2 * shape[0] * shape[1] * shape[2]
        data = [conv_inputs(*shape, torch.bfloat16, "cuda") for _ in range(sets(2 * size))]
        forward = [lambda x=x, w=w, c=c: conv.forward(x, w, c, "silu", None, None) for x, _, w, c in data]
        backward = [
            lambda x=x, g=g, w=w, c=c: conv.backward(g, None, x, w, c, "silu", None, None) for x, g, w, c in data
        ]
        both = [lambda f=f, g=g: (f(), g()) for f, g in zip(forward, backward, strict=True)]
        eager = eager_both = None
        if not variant:
            for x, _, w, c in data:
                x.requires_grad_(), w.requires_grad_(), c.requires_grad_()
            public = [lambda x=x, w=w, c=c: causal_conv1d(x, w, c) for x, _, w, c in data]
            eager = eager_milliseconds(public)
            eager_both = eager_milliseconds(
                [
                    lambda p=p, t=t: torch.autograd.grad(p()[0], (t[0], *t[2:]), t[1])
                    for p, t in zip(public, data, strict=True)
                ]
            )
            data = [tuple(t.detach() for t in one) for one in data]
        report("conv forward", shape, variant, milliseconds(forward), 2 * size, eager, peer_forward)
        report("conv backward", shape, variant, milliseconds(backward), 3 * size)
        report("conv both", shape, variant, milliseconds(both), 5 * size, eager_both, peer_both)


def sweep_conv():
    tiles = [conv.Tile(d, 32 * w * c // d, s, u, w) for d, c, s, u, w in [
        (64, 8, 16, 8, 4), (64, 8, 32, 8, 4), (64, 8, 64, 8, 4), (64, 8, 32, 4, 4), (64, 4, 32, 8, 4), (64, 4, 64, 8,
        4),
        (128, 8, 32, 8, 4), (64, 8, 32, 8, 2),
    ]]  # fmt: skip
    backward_tiles = [conv.Tile(d, 32 * w * c // d, s, u, w) for d, c, s, u, w in [
        (64, 4, 32, 4, 4), (64, 4, 64, 4, 4), (64, 4, 128, 4, 4), (64, 4, 64, 8, 4), (64, 8, 64, 2, 4), (64, 8, 64, 4,
        4),
        (128, 4, 64, 4, 4), (64, 4, 64, 4, 2),
    ]]  # fmt: skip
    chosen = conv.forward_tile, conv.backward_tile
    shapes = {s: CONV[s] for s in [(16, 1536, 2048), (1, 4096, 32768), (64, 1536, 512)]}
    for tile, backward_tile in zip(tiles, backward_tiles, strict=True):
        conv.forward_tile, conv.backward_tile = (
            lambda x, k, restarts, t=tile: t,
            lambda x, k, restarts, t=backward_tile: t,
        )
        name = ",".join(map(str, tile)) + "|" + ",".join(map(str, backward_tile))
        time_conv(shapes, name)
    conv.forward_tile, conv.backward_tile = chosen


def norm_inputs(rows, h, device):
    x, dy = (torch.randn(rows, h, device=device).bfloat16() for _ in range(2))
    residual, dresidual = (torch.randn(rows, h, device=device) for _ in range(2))
    return x, residual, torch.randn(h, device=device), dy, dresidual


def wrong_norm(device, shapes=((333, 768), (77, 5120), (5, 1001))):
    worst = 0.0
    for shape in shapes:
        x, residual, weight, dy, dresidual = norm_inputs(*shape, device)
        y, kept = norm.forward(x, weight, residual, 1e-5, torch.float32, torch.bfloat16)
        want = norm_reference.forward(*map(exact, (x, weight, residual)), 1e-5, torch.float64, torch.float64)
        got_back = norm.backward(dy, dresidual, kept, weight, 1e-5, torch.bfloat16, True)
        want_back = norm_reference.backward(*map(exact, (dy, dresidual, kept, weight)), 1e-5, torch.float64, True)
        for got, exactly in zip((y, kept, *got_back), (*want, *want_back), strict=True):
            limit = 3e-3 if got.dtype == torch.bfloat16 else 1e-5
            worst = max(worst, relative(got, exactly) / limit)
    return worst


def time_norm(shapes, variant=""):
    for rows, h in shapes:
        data = [norm_inputs(rows, h, "cuda") for _ in range(sets(12 * rows * h))]
        kept = [norm.forward(x, w, r, 1e-5, torch.float32, torch.bfloat16)[1] for x, r, w, *_ in data]
        forward = [
            lambda x=x, r=r, w=w: norm.forward(x, w, r, 1e-5, torch.float32, torch.bfloat16) for x, r, w, *_ in data
        ]
        backward = [
            lambda k=k, w=w, g=g, s=s: norm.backward(g, s, k, w, 1e-5, torch.bfloat16, True)
            for k, (_, _, w, g, s) in zip(kept, data, strict=True)
        ]
        eager = None
        if not variant:
            eager = eager_milliseconds([lambda x=x, r=r, w=w: rms_norm(x, w, residual=r) for x, r, w, *_ in data])
        report("norm forward", (rows, h), variant, milliseconds(forward), 12 * rows * h, eager)
        report("norm backward", (rows, h), variant, milliseconds(backward), 16 * rows * h)


def sweep_norm():
    chosen = norm._block
    for elements in (8, 16, 32):

        def block(h, elements=elements):
            rows, width, _ = chosen(h)
            return rows, width, min(max(rows * width // (32 * elements), 1), 32)

        norm._block = block
        time_norm([NORM[0], NORM[-1]], f"{elements} per thread")
    norm._block = chosen


def head_inputs(tokens, h, v, device):
    hidden = torch.randn(tokens, h, device=device).bfloat16()
    weight = torch.randn(v, h, device=device) * 2 * h**-0.5
    targets = torch.randint(v, (tokens,), device=device)
    targets[::7] = -100
    return hidden, weight, targets


def wrong_head(device, shapes=((300, 256, 5003), (70, 64, 50280))):
    worst = 0.0
    for shape in shapes:
        hidden, weight, targets = head_inputs(*shape, device)
        weight = weight.bfloat16().float()  # what the products see; the gradient's dtype stays float32
        got = head.forward(hidden, weight, targets, -100, True, True)
        want = head_reference.forward(hidden.double(), weight.double(), targets, -100, True, True)
        worst = max([worst, *(relative(g, w) / t for g, w, t in zip(got, want, (1e-5, 3e-3, 3e-3), strict=True))])
    return worst


def plain_cross_entropy(hidden, weight, targets):
    """What a model does without the fused op, under autocast."""
    return F.cross_entropy((hidden @ weight.to(hidden.dtype).T).float(), targets)


def time_head(variant="", shapes=tuple(HEAD)):
    for shape in shapes:
        tokens, h, v = shape
        hidden, weight, targets = head_inputs(*shape, "cuda")
        hidden.requires_grad_(), weight.requires_grad_()
        rivals = {"mambakit": linear_cross_entropy} if variant else {
            "mambakit": linear_cross_entropy, "PyTorch": plain_cross_entropy
        }  # fmt: skip
        for name, function in rivals.items():
            hidden.grad = weight.grad = None
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            inputs = (hidden, weight, targets)
            call = lambda f=function, i=inputs: torch.autograd.grad(f(*i), i[:2])  # noqa: E731
            ms = eager_milliseconds([call], repeats=10)
            peak = (torch.cuda.max_memory_allocated() - held) / 2**20
            rate = 6 * tokens * h * v / ms * 1e3
            RESULTS.append({"op": "head both", "shape": shape, "variant": variant or name, "ms": ms, "peak_MiB": peak})
            print(f"{'head both':<16}{'x'.join(map(str, shape)):<16}{variant or name:<24}{ms:8.3f} ms "
                  f"{rate / 1e12:5.0f} TFLOP/s {rate / MATMUL:5.0%}  peak {peak:6.0f} MiB", flush=True)  # fmt: skip


def time_softmax(v, dtype, variant):
    """The head's kernel between its products, alone: a chunk's float32 logits to losses and the logits' gradient."""
    width = -(-v // 64) * 64
    rows = min(head.CHUNK_LOGITS // width // 256 * 256, 65536)
    logits = torch.randn(rows, width, device="cuda")[:, :v] * 3
    targets = torch.randint(v, (rows,), device="cuda")
    losses = torch.full((rows,), torch.nan, device="cuda")
    dlogits = torch.full((rows, width), torch.nan, dtype=dtype, device="cuda")[:, :v]
    block, rest, warps = head.softmax_plan(v)

    def run():
        head._softmax_kernel[(rows,)](
            logits, targets, losses, dlogits, logits.stride(0), dlogits.stride(0), -100,
            V=v, BLOCK_V=block, REST=rest, NEED_GRADIENT=True, num_warps=warps,
        )  # fmt: skip

    run()
    some = slice(0, 64)
    want = logits[some].double().softmax(1)
    want[torch.arange(64), targets[some]] -= 1
    error = relative(dlogits[some], want)
    assert error < (4e-3 if dtype == torch.bfloat16 else 1e-6), f"{variant}: the gradient is {error:.1e} off"
    assert not torch.cat([dlogits.flatten(), losses]).isnan().any(), f"{variant}: something is not written"
    ms = _median(run, 30)
    report("head softmax", (rows, v), f"{variant} {str(dtype)[6:]}", ms, rows * v * (4 + dlogits.element_size()))


def sweep_head():
    chosen = head.CHUNK_LOGITS, head.HELD_BLOCKS, head.LONGEST_HELD
    for exponent in (25, 26, 28):
        head.CHUNK_LOGITS = 2**exponent
        time_head(f"2^{exponent} logits", HEAD[:1])
    head.CHUNK_LOGITS = chosen[0]
    head.LONGEST_HELD = 2**30
    for v in (256, 4096, 32000, 50277, 50280, 65024, 80000, 90000, 102400, 130001, 151936):
        for held in (1, 12, 24, 25, 27):  # 1: all but a row's end is read twice
            head.HELD_BLOCKS = held
            for dtype in (torch.bfloat16, torch.float32) if v in (50280, 151936) else (torch.bfloat16,):
                time_softmax(v, dtype, f"{held} blocks held")
    _, head.HELD_BLOCKS, head.LONGEST_HELD = chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time the rival tiles too")
    record.add_argument(parser)
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    plans = [
        ("conv", wrong_conv, lambda: time_conv(CONV), sweep_conv),
        ("norm", wrong_norm, lambda: time_norm(NORM), sweep_norm),
        ("head", wrong_head, time_head, sweep_head),
    ]
    red = []
    for name, wrong, time, sweep in plans:
        torch.manual_seed(0)
        share = wrong("cuda")
        print(f"{name}: largest error is {share:.2f} of its limit")
        if not share <= 1:
            print(f"{name}: WRONG, not timed")
            red.append(name)
            continue
        time()
        if options.sweep:
            sweep()
    record.write(options.json, {"ops": RESULTS}, gpus=1)
    raise SystemExit(1 if red else 0)


if __name__ == "__main__":
    main()
