"""Log-likelihood, perplexity and bits per character of text files, read as a stream at constant memory; or of choices after a
prefix, which is read once; or of every token of a text."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any, TextIO

from mambakit.commands.loading import add_model_arguments, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help='UTF-8 text files; "-" is standard input')
    add_model_arguments(parser)
    parser.add_argument("--chunk-size", type=int, default=1024, help="tokens per forward; memory is proportional to it")
    parser.add_argument("--per-token", action="store_true", help="every token's log-probability (with --json)")
    parser.add_argument("--json", action="store_true", help="one JSON object for each file, choice or text")
    parser.add_argument("--prefix", metavar="TEXT", help="score what may come after this text: --choice, --choices")
    parser.add_argument("--choice", action="append", default=[], metavar="TEXT", help="a continuation (repeatable)")
    parser.add_argument("--choices", metavar="FILE", help="continuations, one a line")
    parser.add_argument("--echo", metavar="TEXT", help="this text's tokens, with the log-probability of each")
    parser.add_argument(
        "--top", type=int, default=0, metavar="K", help="with --echo: the K likeliest tokens in each place"
    )


def run(args: argparse.Namespace) -> int:
    _check(args)
    model, tokenizer = load(args)
    if args.prefix is not None:
        return _choices(args, model, tokenizer)
    if args.echo is not None:
        return _echo(args, model, tokenizer)
    return _files(args, model, tokenizer)


def _check(args: argparse.Namespace) -> None:
    if sum((bool(args.files), args.prefix is not None, args.echo is not None)) != 1:
        raise ValueError("give text files, or --prefix, or --echo: one of them")
    if args.prefix is not None and not (args.choice or args.choices):
        raise ValueError("--prefix needs something to come after it: --choice TEXT, or --choices FILE")
    if args.per_token and not args.json:
        raise ValueError("--per-token lists every token; add --json")
    for name in (*args.files, *([args.choices] if args.choices else [])):
        if name != "-" and not os.path.isfile(name):
            raise ValueError(f"there is no text file {name}")


def _choices(args: argparse.Namespace, model: Any, tokenizer: Any) -> int:
    from rich.console import Console
    from rich.table import Table

    from mambakit.generation.score import score_choices

    choices = list(args.choice)
    if args.choices:
        with _open(args.choices) as file:
            choices += [line for line in file.read().splitlines() if line]
    table = Table("choice", "tokens", "ln p", "ln p/token", "greedy")
    for choice, score in zip(choices, score_choices(model, tokenizer, args.prefix, choices), strict=True):
        count = len(score.log_probs)
        if args.json:
            result = {
                "choice": choice, "tokens": count, "log_prob": score.log_prob,
                "log_prob_per_token": score.log_prob_per_token, "greedy": score.greedy,
            }  # fmt: skip
            if args.per_token:
                result["log_probs"] = score.log_probs.tolist()
            print(json.dumps(result, ensure_ascii=False), flush=True)
        else:
            averages = f"{score.log_prob:.4f}", f"{score.log_prob_per_token:.4f}"
            table.add_row(repr(choice)[1:-1], f"{count:,}", *averages, "yes" if score.greedy else "")
    if not args.json:
        Console().print(table)
    return 0


def _echo(args: argparse.Namespace, model: Any, tokenizer: Any) -> int:
    from rich.console import Console
    from rich.table import Table

    from mambakit.generation.logprobs import echo

    ids = tokenizer(args.echo, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0].long()
    logprobs = echo(model, tokenizer, ids, top=args.top, chunk_size=args.chunk_size)
    if args.json:
        print(json.dumps({"text": args.echo, "logprobs": logprobs}, ensure_ascii=False), flush=True)
        return 0
    table = Table("token", "ln p", "likeliest")
    columns = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"])
    for token, log_prob, others in zip(*columns, strict=True):
        likeliest = "  ".join(f"{text!r} {x:.2f}" for text, x in (others or {}).items())
        table.add_row(repr(token), "" if log_prob is None else f"{log_prob:.4f}", likeliest)
    Console().print(table)
    return 0


def _files(args: argparse.Namespace, model: Any, tokenizer: Any) -> int:
    from rich.console import Console
    from rich.table import Table

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
