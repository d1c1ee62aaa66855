"""Log-likelihood, perplexity and bits per character of text files, read as a stream at constant memory; or of choices
after a prefix, which is read once; or of every token of a text; or of every line of a log as it comes (--follow)."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from mambakit.commands import following
from mambakit.commands.loading import add_model_arguments, add_tokenizer_argument, load
from mambakit.commands.options import integer, require_with, text
from mambakit.commands.texts import opened_text, require_file
from mambakit.errors import UsageError
from mambakit.opening import COMPRESSED
from mambakit.output import description_column, table, terminal

_CHUNK_SIZE = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help='UTF-8 text files; "-" is standard input')
    add_model_arguments(parser)
    add_tokenizer_argument(parser)
    parser.add_argument(
        "--chunk-size", type=integer(1), metavar="N", help="tokens per forward; memory grows with it (default 1024)"
    )
    parser.add_argument("--per-token", action="store_true", help="every token's log-probability (with --json)")
    parser.add_argument("--json", action="store_true", help="one JSON object for each file, choice or text")
    parser.add_argument(
        "--prefix", type=text, metavar="TEXT", help="score what may come after this text: --choice, --choices"
    )
    parser.add_argument(
        "--choice", type=text, action="append", default=[], metavar="TEXT", help="a continuation (repeatable)"
    )
    parser.add_argument("--choices", metavar="FILE", help="continuations, one a line")
    parser.add_argument(
        "--echo", type=text, metavar="TEXT", help="this text's tokens, with the log-probability of each"
    )
    parser.add_argument("--top", type=integer(0), metavar="K", help="with --echo: the K likeliest tokens in each place")
    following.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    _check(args)
    model, tokenizer = load(args, inference=True)
    if args.prefix is not None:
        return _choices(args, model, tokenizer)
    if args.echo is not None:
        return _echo(args, model, tokenizer)
    return following.follow(args, model, tokenizer) if args.follow else _files(args, model, tokenizer)


def _check(args: argparse.Namespace) -> None:
    if sum((bool(args.files), args.prefix is not None, args.echo is not None)) != 1:
        raise UsageError("give text files, or --prefix, or --echo: one of them")
    if args.prefix is not None and not (args.choice or args.choices):
        raise UsageError("--prefix needs something to come after it: --choice TEXT, or --choices FILE")
    for option, value in (("--choice", args.choice), ("--choices", args.choices)):
        require_with(option, bool(value), "--prefix", args.prefix is not None)
    require_with("--top", args.top is not None, "--echo", args.echo is not None)
    if args.per_token and not args.json:
        raise UsageError("--per-token lists every token; add --json")
    if args.follow and args.chunk_size is not None:
        raise UsageError("--chunk-size has no effect with --follow, which reads lines as they come; drop it")
    args.chunk_size = args.chunk_size or _CHUNK_SIZE
    following.check(args)
    for name in (*args.files, *([args.choices] if args.choices else [])):
        if name != "-":
            require_file(name, "text")


def _choices(args: argparse.Namespace, model: Any, tokenizer: Any) -> int:
    from mambakit.generation.score import score_choices

    choices = list(args.choice)
    if args.choices:
        choices += [line for line in _whole(args.choices).splitlines() if line]
        if not choices:
            raise UsageError(f"{args.choices} holds no choices; write one on each line")
    rows = []
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
            rows.append((repr(choice)[1:-1], f"{count:,}", *averages, "yes" if score.greedy else ""))
    if not args.json:
        table(("choice", "tokens", "ln p", "ln p/token", "greedy"), rows)
    return 0


def _echo(args: argparse.Namespace, model: Any, tokenizer: Any) -> int:
    from mambakit.generation.logprobs import echo

    ids = tokenizer(args.echo, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0].long()
    logprobs = echo(model, tokenizer, ids, top=args.top or 0, chunk_size=args.chunk_size)
    if args.json:
        print(json.dumps({"text": args.echo, "logprobs": logprobs}, ensure_ascii=False), flush=True)
        return 0
    rows = []
    columns = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"])
    for token, log_prob, others in zip(*columns, strict=True):
        likeliest = "  ".join(f"{text!r} {x:.2f}" for text, x in (others or {}).items())
        rows.append((repr(token), "" if log_prob is None else f"{log_prob:.4f}", likeliest))
    table(("token", "ln p", "likeliest"), rows)
    return 0


def _files(args: argparse.Namespace, model: Any, tokenizer: Any) -> int:
    rows = []
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
            rows.append((name, f"{score.tokens:,}", f"{score.nats:,.1f}", *(f"{x:.4f}" for x in averages)))
    if not args.json:
        table(("file", "tokens", "nats", "nats/token", "perplexity", "bits/character", "bits/byte"), rows)
    return 0


def _score(args: argparse.Namespace, model: Any, tokenizer: Any, name: str) -> Any:
    from rich.progress import BarColumn, Progress, TimeElapsedColumn

    from mambakit.generation.score import score_text

    known = name != "-" and Path(name).suffix not in COMPRESSED
    total = os.path.getsize(name) if known else None  # bytes: close enough to characters for a bar
    console = terminal(stderr=True)
    columns = (description_column(), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        with opened_text(name) as file:
            score = score_text(
                model,
                tokenizer,
                iter(lambda: file.read(1 << 16), ""),
                chunk_size=args.chunk_size,
                per_token=args.per_token,
                progress=lambda done: bar.update(task, completed=done),
            )
    if not score.tokens:
        raise UsageError(f"{'standard input' if name == '-' else name} holds no text")
    return score


def _whole(name: str) -> str:
    with opened_text(name) as file:
        return file.read()
