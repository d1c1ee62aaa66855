"""What the model does with a text: each token's surprise, each layer's step sizes and half-lives, and its implicit
attention, as a page (.html), a picture (.png) or arrays (.npz)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mambakit.commands.loading import add_model_arguments, add_tokenizer_argument, load
from mambakit.commands.options import check_output_file, integer, text
from mambakit.commands.texts import read_text
from mambakit.errors import UsageError
from mambakit.output import say, table, terminal

_KINDS = (".html", ".png", ".npz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", type=text, metavar="TEXT", help='the text; "-" is standard input')
    parser.add_argument("--file", metavar="FILE", help="a text file in its place")
    parser.add_argument(
        "--out", action="append", default=[], metavar="FILE", help="page.html, page.png or page.npz (repeatable)"
    )
    parser.add_argument(
        "--layers", type=integer(0), nargs="+", metavar="N", help="of these the attention is shown (default: four)"
    )
    parser.add_argument(
        "--channels", type=integer(0), nargs="+", metavar="N", help="of these the mean (default: sixteen of each layer)"
    )
    parser.add_argument("--chunk-size", type=integer(1), default=256, help="tokens per forward (default 256)")
    add_model_arguments(parser)
    add_tokenizer_argument(parser)


def run(args: argparse.Namespace) -> int:
    if (args.text is None) == (args.file is None):
        raise UsageError("give a text, or --file: one of them")
    if not args.out:
        raise UsageError("--out says what is written: page.html, page.png or page.npz; give one or more")
    for name in args.out:
        if Path(name).suffix not in _KINDS:
            raise UsageError(f"--out {name} ends in none of {', '.join(_KINDS)}, which say what is written")
        check_output_file("--out", name)
    if any(Path(name).suffix == ".png" for name in args.out):
        from mambakit.inspection.picture import require_matplotlib

        require_matplotlib()
    written = args.text if args.file is None and args.text != "-" else read_text(args.file or "-", "text")
    if not written:
        raise UsageError("the text is empty; give a token or more")

    from mambakit.inspection import inspect, summarize

    model, tokenizer = load(args)
    found = inspect(model, tokenizer, written, layers=args.layers, channels=args.channels, chunk_size=args.chunk_size)
    shown = summarize(found)
    for name in args.out:
        _write(found, shown, name, "the embedded model" if args.model is None else str(args.model))
    highest = found.surprise.argsort(descending=True)[:5].tolist()
    rows = [(f"{i:,}", repr(found.pieces[i]), f"{float(found.surprise[i]):.2f}") for i in highest if i]
    table(("token", "text", "surprise"), rows)
    say(terminal(stderr=True), f"written: {', '.join(args.out)}")
    return 0


def _write(found: Any, shown: Any, name: str, model: str) -> None:
    from mambakit.inspection import draw, page
    from mambakit.writing import replacing

    with replacing(name) as temporary:
        if name.endswith(".html"):
            temporary.write_text(page(shown, model), encoding="utf-8")
        elif name.endswith(".png"):
            draw(shown, temporary, model)
        else:
            import numpy as np

            with open(temporary, "wb") as file:
                np.savez_compressed(file, pieces=np.array(found.pieces), **found.arrays())
