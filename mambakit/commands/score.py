"""Log-likelihood, perplexity and bits per character of text files, read as a stream at constant memory."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any, TextIO

from mambakit.commands.loading import add_model_arguments, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help='UTF-8 text files; "-" is standard input')
    add_model_arguments(parser)
    parser.add_argument("--chunk-size", type=int, default=1024, help="tokens per forward; memory is proportional to it")
    parser.add_argument("--per-token", action="store_true", help="every token's log-probability (with --json)")
    parser.add_argument("--json", action="store_true", help="one JSON object for each file")


def run(args: argparse.Namespace) -> int:
    if args.per_token and not args.json:
        raise ValueError("--per-token lists every token; add --json")
    for name in args.files:
        if name != "-" and not os.path.isfile(name):
            raise ValueError(f"there is no text file {name}")

    from rich.console import Console
    from rich.table import Table

    model, tokenizer = load(args)
    table = Table("file", "tokens", "nats", "nats/token", "perplexity", "bits/character", "bits/byte")
    for name in args.files:
        score = _score(args, model, tokenizer, name)
        averages = (score.nats_per_token, score.perplexity, score.bits_per_character, score.bits_per_byte)
        if args.json:
            result = {
                "file": name, "tokens": score.tokens, "characters": score.characters, "bytes": score.bytes,
                "nats": score.nats, "nats_per_token": averages[0], "perplexity": averages[1],
                "bits_per_character": averages[2], "bits_per_byte": averages[3],
            }  # fmt: skip
            if args.per_token:
                result["log_probs"] = score.log_probs
            print(json.dumps(result), flush=True)
        else:
            table.add_row(name, f"{score.tokens:,}", f"{score.nats:,.1f}", *(f"{x:.4f}" for x in averages))
    if not args.json:
        Console().print(table)
    return 0


def _score(args: argparse.Namespace, model: Any, tokenizer: Any, name: str) -> Any:
    from rich.console import Console
    from rich.progress import Progress

    from mambakit.generation.score import score_text

    total = None if name == "-" else os.path.getsize(name)  # bytes: close enough to characters for a bar
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        try:
            with _open(name) as file:
                return score_text(
                    model,
                    tokenizer,
                    iter(lambda: file.read(1 << 16), ""),
                    chunk_size=args.chunk_size,
                    per_token=args.per_token,
                    progress=lambda done: bar.update(task, completed=done),
                )
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 text ({error})") from error


def _open(name: str) -> TextIO:
    return (
        os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8")
        if name == "-"
        else open(name, encoding="utf-8", newline="")
    )
