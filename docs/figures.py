"""Draws the pictures of docs/concepts: python docs/figures.py (needs the extra "train", for matplotlib).

images/block.png    one layer: what flows through it, and where the state is
images/memory.png   half-lives of the embedded model's state, over its own opening text
images/chunks.png   a long row cut into chunks: how the state is carried
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
IMAGES = ROOT / "docs" / "images"
PLAIN, STATE, CHOICE = "#e8eef7", "#fde7c9", "#dff1e0"
TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals, when it was checked by a violent gust."


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


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    block()
    chunks()
    memory()
