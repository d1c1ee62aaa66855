"""Draws the documentation's pictures: python docs/figures.py [NAME ...] (needs the extra "train", for matplotlib).

images/block.png       one layer: what flows through it, and where the state is
images/memory.png      half-lives of the embedded model's state, over its own opening text
images/chunks.png      a long row cut into chunks: how the state is carried
images/decoding.png    from `generate` to a kernel
images/kernels.png     which op runs where in a layer, and which implementation serves it
images/scan.png        a CTA's round and tiles in the CUDA scan
images/persistent.png  a layer of the persistent decode kernel
images/cpu_scan.png    a tile of the CPU's scan
images/generate.png    tokens a second by batch, from the records in docs/benchmarks
images/context.png     the same by context, as a ratio to a Llama's
images/inspection.png  what `mambakit inspect` shows of a text
images/length.png      time to read a prompt by its length, from the records
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import ROOT
from benchmarks.tables.records import Records, select

IMAGES = ROOT / "docs" / "images"
PLAIN, STATE, CHOICE = "#e8eef7", "#fde7c9", "#dff1e0"
TEXT = (
    "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals, when it was checked by "
    "a "
    "violent gust."
)


def box(axes, x, y, text, color=PLAIN, width=2.1, height=0.62):
    patch = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.04", fc=color, ec="#445"
    )
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(axes, start, end, text="", **style):
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#445", "shrinkA": 0, "shrinkB": 0, **style})
    if text:
        axes.text((start[0] + end[0]) / 2 + 0.08, (start[1] + end[1]) / 2, text, fontsize=8, color="#445", va="center")


def canvas(width, height, x, y):
    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.set(xlim=x, ylim=y, aspect="equal")
    axes.axis("off")
    return figure, axes


def save(figure, name):
    figure.savefig(IMAGES / name, dpi=130)
    pyplot.close(figure)
    print(IMAGES / name)


def block():
    figure, axes = canvas(7.4, 6.6, (-4.6, 4.9), (-0.6, 8.0))
    arrow(axes, (0, -0.5), (0, 0.05), "residual stream (b, l, h), float32")
    box(axes, 0, 0.4, "RMSNorm")
    arrow(axes, (0, 0.75), (0, 1.25))
    box(axes, 0, 1.6, "in_proj: h to 2 d")
    arrow(axes, (-0.6, 1.95), (-1.6, 2.45), "x (b, l, d)")
    arrow(axes, (1.0, 1.95), (3.5, 5.15), "z (b, l, d)")
    box(axes, -1.8, 2.8, "causal conv1d, SiLU")
    box(axes, -3.9, 2.8, "last k - 1\ninputs", STATE, 1.2)
    arrow(axes, (-3.25, 2.8), (-2.9, 2.8), arrowstyle="<->")
    arrow(axes, (-1.8, 3.15), (-1.8, 4.85), "u")
    arrow(axes, (-1.2, 3.15), (0.2, 3.65))
    box(axes, 0.6, 4.0, "x_proj, dt_proj", CHOICE, 1.9)
    arrow(axes, (0.2, 4.35), (-1.0, 4.85), "  delta, B, C: chosen\n  by the input")
    box(axes, -1.8, 5.2, "selective scan")
    box(axes, -3.9, 5.2, "h (d, n)\nfloat32", STATE, 1.2)
    arrow(axes, (-3.25, 5.2), (-2.9, 5.2), arrowstyle="<->")
    arrow(axes, (-1.8, 5.55), (-0.4, 6.05), "y")
    box(axes, 3.6, 5.5, "SiLU", width=1.2)
    arrow(axes, (3.2, 5.85), (0.68, 6.3))
    box(axes, 0, 6.4, "product", width=1.3)
    arrow(axes, (0, 6.75), (0, 7.05))
    box(axes, 0, 7.4, "out_proj: d to h, added to the stream", width=3.6)
    axes.text(-4.5, 7.6, "yellow: the state,\nall that is kept\nbetween two tokens", fontsize=8.5, va="top")
    save(figure, "block.png")


@torch.no_grad()
def memory():
    from mambakit import AutoModelForCausalLM, AutoTokenizer
    from mambakit.assets import default_model_path

    folder = default_model_path()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    steps = []
    hooks = [
        block.mixer.dt_proj.register_forward_hook(
            lambda m, i, out: steps.append(torch.nn.functional.softplus(out + m.bias))
        )
        for block in model.backbone.layers
    ]
    model(tokenizer(TEXT, return_tensors="pt").input_ids)
    for hook in hooks:
        hook.remove()
    figure, axes = pyplot.subplots(figsize=(6.6, 3.8), layout="constrained")
    edges = np.logspace(-1, 5, 60)
    for i, (block, delta) in enumerate(zip(model.backbone.layers, steps, strict=True)):
        decay = delta[0].mean(0)[:, None] * block.mixer.A_log.exp()  # (d, n): -ln of what is left after one token
        lives = (np.log(2) / decay).flatten().numpy()
        color = pyplot.cm.viridis(i / max(1, len(steps) - 1))
        axes.hist(lives, edges, histtype="step", density=False, color=color, label=f"layer {i}" if i % 4 == 0 else None)
    axes.set(xscale="log", xlabel="half-life of a state, tokens", ylabel="states (d x n a layer)")
    axes.set_title("How long the embedded model remembers", fontsize=10)
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3)
    save(figure, "memory.png")


def chunks():
    figure, axes = canvas(8.2, 3.2, (-0.4, 12.6), (-0.6, 4.2))
    for i in range(4):
        x = 1.5 + 3 * i
        box(axes, x, 0.4, f"chunk {i + 1}: tokens in turn", width=2.6)
        arrow(axes, (x, 0.75), (x, 1.45))
        box(axes, x, 1.8, "its own state from 0,\nand exp(A sum(delta))", STATE, 2.6, 0.75)
        arrow(axes, (x, 2.2), (x, 2.85))
        if i:
            arrow(axes, (x - 1.7, 3.2), (x - 1.3, 3.2))
        box(axes, x, 3.2, "carry: h = decay h + own", CHOICE, 2.6)
    axes.text(
        -0.3,
        3.95,
        "1 and 2: all chunks at once.  3: one cheap step a chunk.  4: the outputs, from the right state, all at once.",
        fontsize=8.5,
    )
    save(figure, "chunks.png")


def decoding():
    figure, axes = canvas(9.2, 4.1, (-0.2, 14.6), (-0.9, 5.3))
    for x, text, where in (
        (1.2, "generate()", "models/generate.py"), (4.2, "prefill", "decoding/prefill.py"),
        (7.2, "loop", "decoding/loop.py"), (10.2, "decoder", "decoding/registry.py"), (13.2, "kernel", "ops/decode/"),
    ):  # fmt: skip
        box(axes, x, 3.4, text, width=2.2)
        axes.text(x, 2.85, where, ha="center", va="top", fontsize=7.5, color="#445", family="monospace")
        if x < 13:
            arrow(axes, (x + 1.15, 3.4), (x + 1.85, 3.4))
    box(axes, 4.2, 0.9, "state\n(b, d, k - 1), (b, d, n)", STATE, 2.6, 0.8)
    arrow(axes, (4.2, 2.45), (4.2, 1.35), "prompt read, written once")
    box(axes, 9.6, 0.9, "slots: a state each", STATE, 2.6, 0.8)
    arrow(axes, (5.55, 0.9), (8.25, 0.9), "")
    axes.text(6.9, 1.05, "admit", ha="center", fontsize=8, color="#445")
    arrow(axes, (8.9, 1.35), (7.3, 2.45), "", arrowstyle="<->")
    box(axes, 7.2, 4.9, "sampler", CHOICE, 2.2)
    arrow(axes, (6.9, 3.75), (6.9, 4.55), "")
    arrow(axes, (7.5, 4.55), (7.5, 3.75), "  tokens, logits")
    arrow(axes, (12.8, 2.4), (10.95, 1.2), "  one token a slot, in place")
    axes.text(
        -0.1,
        -1.3,
        "Once a call: generate, prefill, the choice of a decoder.   Once a token: loop, kernel, sampler.",
        fontsize=8.5,
    )
    save(figure, "decoding.png")


def kernels():
    figure, axes = canvas(8.6, 4.4, (-0.3, 13.0), (-0.9, 6.0))
    ops = [
        ("rms_norm", "C++ | Triton"), ("in_proj (linear)", "PyTorch; packed: C++"), ("causal_conv1d", "C++ | Triton"),
        ("x_proj, dt_proj (linear)", "PyTorch; packed: C++"), ("selective_scan, gate", "C++ | CUDA C++, Triton"),
        ("out_proj (linear)", "PyTorch; packed: C++"),
    ]  # fmt: skip
    for i, (name, serves) in enumerate(ops):
        y = 5.5 - i
        box(axes, 2.0, y, name, CHOICE if "scan" in name or "conv" in name else PLAIN, 3.0, 0.6)
        axes.text(3.7, y, serves, fontsize=8, va="center", color="#445")
        if i < len(ops) - 1:
            arrow(axes, (2.0, y - 0.35), (2.0, y - 0.65))
    box(axes, 10.6, 4.2, "training: fused_mixer,\none op a layer, with its gradient", PLAIN, 4.2, 0.9)
    box(
        axes,
        10.6,
        2.6,
        "decode: all layers, head and\nchoice in one call (CPU)\nor one CUDA graph (GPU)",
        STATE,
        4.2,
        1.2,
    )
    box(axes, 10.6, 1.0, "linear_cross_entropy,\nsampling: after the last layer", PLAIN, 4.2, 0.9)
    axes.text(7.4, 5.4, "the same ops, put together:", fontsize=9)
    axes.text(-0.2, -0.75, "Left: the ops of a layer's forward, CPU | GPU.", fontsize=8.5)
    save(figure, "kernels.png")


def scan():
    figure, axes = canvas(9.0, 4.2, (-0.4, 14.4), (-1.4, 5.4))
    for i in range(4):
        color = (STATE, CHOICE, PLAIN, PLAIN)[i]
        box(axes, 2.0 + 3.4 * i, 4.6, ("round 1: walked", "round 2: loading", "round 3", "round 4")[i], color, 3.0)
    axes.text(
        -0.3,
        5.2,
        "a row: rounds of 16 tokens, tiles of 8; cp.async loads a round while the one before is walked",
        fontsize=8.5,
    )
    for x in (1.25, 2.75):
        box(axes, x, 3.2, "8 tokens", STATE, 1.36, 0.6)
        arrow(axes, (2.0, 4.25), (x, 3.55))
    for i in range(4):
        box(axes, 6.0 + 2.3 * i, 2.6, f"channel {i}\n16 states, registers", STATE, 2.1, 0.9)
        for lane in range(2):
            box(axes, 5.5 + 2.3 * i + 1.0 * lane, 1.2, f"lane {2 * i + lane}", PLAIN, 0.85, 0.55)
            arrow(axes, (5.5 + 2.3 * i + 1.0 * lane, 1.5), (6.0 + 2.3 * i, 2.1))
    arrow(axes, (3.5, 3.2), (4.9, 2.7))
    axes.text(4.9, 0.25, "two lanes share a channel, 8 states each; one exchanged sum a token gives y", fontsize=8.5)
    axes.text(-0.3, -0.5, "whole row: one CTA from end to end", fontsize=8.5)
    axes.text(
        -0.3,
        -0.9,
        "split scan: chunks from zero, carry, chunks again     chained scan: the next CTA waits for the state",
        fontsize=8.5,
    )
    save(figure, "scan.png")


def persistent():
    figure, axes = canvas(9.2, 4.6, (-0.3, 14.8), (-1.0, 6.2))
    phases = ("in_proj, conv,\nx_proj", "dt_proj, state,\ngate", "out_proj,\nstream")
    for cta, y in enumerate((4.6, 3.2, 1.8)):
        axes.text(-0.2, y, f"CTA {cta}" if cta < 2 else "CTA 131", fontsize=9, va="center")
        for i, text in enumerate(phases):
            box(axes, 2.6 + 4.2 * i, y, text, (PLAIN, STATE, PLAIN)[i], 2.5, 0.9)
            if i < 2:
                arrow(axes, (3.9 + 4.2 * i, y), (5.5 + 4.2 * i, y))
    for i, text in enumerate(("sums of x_proj", "y", "residual stream")):
        x = 4.7 + 4.2 * i
        axes.plot([x, x], [1.2, 5.2], color="#445", linestyle=":")
        axes.text(x, 5.45, f"grid exchange:\n{text}", ha="center", fontsize=8.5)
    axes.plot([1.3, 13.6], [0.5, 0.5], color="#b07d2b", linewidth=5, alpha=0.6)
    axes.text(
        1.3,
        0.0,
        "weights stream into each warp's ring of tiles all the time, also while CTAs wait for each other",
        fontsize=8.5,
    )
    axes.text(1.3, -0.6, "a place holds a sentinel until its value is written: no fence, no counter", fontsize=8.5)
    save(figure, "persistent.png")


def cpu_scan():
    figure, axes = canvas(8.4, 3.6, (-0.3, 13.2), (-1.1, 4.6))
    for i in range(8):
        box(axes, 1.0 + 0.62 * i, 3.4, f"d{i}", STATE, 0.5, 0.5)
    axes.text(0.6, 4.0, "a vector: 8 neighbouring channels (AVX2), one state of each", fontsize=8.5)
    arrow(axes, (3.2, 3.05), (3.2, 2.4), "  for n = 1 ... 16")
    box(axes, 3.2, 1.9, "h = exp(delta A) h + delta B u;  y += C h", PLAIN, 5.8, 0.7)
    arrow(axes, (6.3, 1.9), (7.7, 1.9))
    box(axes, 10.2, 1.9, "D u, gate: y of 8 channels", PLAIN, 4.4, 0.7)
    arrow(axes, (3.2, 1.5), (3.2, 0.8), "  for 32 tokens: states stay in registers")
    box(axes, 3.2, 0.3, "the next tile, prefetched", CHOICE, 4.2, 0.6)
    axes.text(
        0.0,
        -0.8,
        "OpenMP: groups of channels and rows of the batch are shared out among the threads",
        fontsize=8.5,
    )
    save(figure, "cpu_scan.png")


def generate():
    records = Records()
    rows = records.rows("2026-11-28-h100-generate", "generate", shape="1.4b")
    lines(
        rows,
        "batch",
        "tokens_per_second",
        "new tokens/s, prompt of 2,048 included",
        "1.4b, one H100, bfloat16, greedy",
        "generate",
    )


def length():
    rows = Records().rows("2026-11-28-h100-generation", "length", shape="130m")
    lines(
        rows,
        "tokens",
        "seconds",
        "seconds to the first token's logits",
        "130m, one prompt, one H100, bfloat16",
        "length",
    )


def context():
    from benchmarks.context import draw
    from benchmarks.tables.records import latest

    record = json.loads((ROOT / "docs" / "benchmarks" / f"{latest('context')}.json").read_text(encoding="utf-8"))
    draw(record["results"]["context"], record["machine"], IMAGES / "context.png")


def inspection():
    import mambakit
    from mambakit.assets import default_model_path
    from mambakit.inspection import draw, inspect, summarize

    text = TEXT[: TEXT.index(" gust")] + (
        " gust of wind which swept up the streets. Mr. Darcy looked at the sea. Then Mr. Darcy said: 'I shall not come "
        "again.'"
    )
    tokenizer = mambakit.AutoTokenizer.from_pretrained(default_model_path())
    model = mambakit.AutoModelForCausalLM.from_pretrained(default_model_path(), dtype="float32").eval()
    draw(summarize(inspect(model, tokenizer, text)), IMAGES / "inspection.png", "the embedded model", dpi=60)


def lines(rows, x, y, label, title, name):
    """A line for each contender, both axes logarithmic; what ran out of memory is left out."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for who in dict.fromkeys(row["who"] for row in rows):
        line = [row for row in select(rows, who=who) if row[y] is not None]
        axes.plot([row[x] for row in line], [row[y] for row in line], marker="o", label=who)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=label, title=title)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, f"{name}.png")


FIGURES = {
    figure.__name__: figure
    for figure in (
        block,
        memory,
        chunks,
        decoding,
        kernels,
        scan,
        persistent,
        cpu_scan,
        generate,
        context,
        length,
        inspection,
    )
}


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for chosen in sys.argv[1:] or FIGURES:
        FIGURES[chosen]()
