"""Measure a model on local files (BLiMP, LAMBADA, bits per byte), or through the lm-evaluation-harness."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from mambakit.commands.loading import add_model_arguments, add_tokenizer_argument, load
from mambakit.commands.options import integer, text
from mambakit.commands.texts import require_file
from mambakit.errors import UsageError
from mambakit.opening import COMPRESSED
from mambakit.output import description_column, table, terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, what, files in (
        ("blimp", "grammar: which of two sentences is likelier", "JSON lines: sentence_good, sentence_bad, UID, field"),
        ("lambada", "the last word of a passage", "JSON lines: text"),
        ("bpb", "bits per byte and per character of text", "UTF-8 text"),
    ):
        sub = kinds.add_parser(name, help=what, description=what)
        sub.add_argument("files", nargs="+", metavar="FILE", help=f"{files}; plain, or {', '.join(COMPRESSED)}")
        add_model_arguments(sub)
        add_tokenizer_argument(sub)
        sub.add_argument(
            "--batch-tokens", type=integer(1), default=4096, help="tokens of a forward pass (default 4096)"
        )
        sub.add_argument("--json", action="store_true", help="everything measured, as one JSON object")
        if name == "bpb":
            sub.add_argument(
                "--separator", type=text, help="what stands between the documents of a file (default: none)"
            )
        else:
            items = "pairs of a paradigm" if name == "blimp" else "passages"
            sub.add_argument(
                "--limit", type=integer(0), default=0, help=f"only the first {items}, this many (default: all)"
            )
    sub = kinds.add_parser("harness", help="the lm-evaluation-harness, with --model mambakit")
    sub.add_argument("arguments", nargs=argparse.REMAINDER, help="the harness's own: run --model mambakit --tasks ...")


def run(args: argparse.Namespace) -> int:
    if args.benchmark == "harness":
        if importlib.util.find_spec("lm_eval") is None:
            raise UsageError('the lm-evaluation-harness is not installed: pip install "mambakit[eval]"')
        from mambakit.evaluation.harness import run_harness

        run_harness(args.arguments)
        return 0
    for name in args.files:
        require_file(name, "")
    args.files = [Path(name) for name in args.files]

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    model, tokenizer = load(args)
    console = terminal(stderr=True)
    columns = (description_column(), BarColumn(), TextColumn("{task.completed:,}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(args.benchmark, total=None)
        measured, rows = _MEASURES[args.benchmark](args, model, tokenizer, lambda done: bar.advance(task, done))
    if args.json:
        print(json.dumps({"benchmark": args.benchmark, "model": model.config.name_or_path, **measured}))
    else:
        table(rows[0], rows[1:])
    return 0


def _blimp(args: argparse.Namespace, model: Any, tokenizer: Any, progress: Any) -> tuple[dict[str, Any], list[tuple]]:
    from mambakit.evaluation.benchmarks import blimp

    found = blimp(model, tokenizer, args.files, limit=args.limit, batch_tokens=args.batch_tokens, progress=progress)
    fields = found.by_field()
    rows: list[tuple] = [("field", "paradigms", "accuracy")]
    rows += [(name, str(list(found.fields.values()).count(name)), f"{value:.2%}") for name, value in fields.items()]
    rows.append(("all", str(len(found.paradigms)), f"{found.accuracy:.2%}"))
    measured = {"accuracy": found.accuracy, "pairs": found.pairs, "fields": fields, "paradigms": found.paradigms}
    return measured, rows


def _lambada(args: argparse.Namespace, model: Any, tokenizer: Any, progress: Any) -> tuple[dict[str, Any], list[tuple]]:
    from mambakit.evaluation.benchmarks import lambada

    found = lambada(model, tokenizer, args.files, limit=args.limit, batch_tokens=args.batch_tokens, progress=progress)
    rows = [
        ("passages", "accuracy", "perplexity of the word"),
        (f"{found.passages:,}", f"{found.accuracy:.2%}", f"{found.perplexity:,.2f}"),
    ]
    return vars(found), rows


def _bits(args: argparse.Namespace, model: Any, tokenizer: Any, progress: Any) -> tuple[dict[str, Any], list[tuple]]:
    from mambakit.evaluation.benchmarks import bits

    found = bits(
        model, tokenizer, args.files, separator=args.separator or "", chunk_size=args.batch_tokens, progress=progress
    )
    scores = dict(found.files)
    if len(scores) > 1:
        scores["all"] = found.total
    rows: list[tuple] = [("file", "bytes", "tokens", "bits/byte", "bits/character", "nats/token")]
    measured = {}
    for name, score in scores.items():
        averages = (score.bits_per_byte, score.bits_per_character, score.nats_per_token)
        rows.append((name, f"{score.bytes:,}", f"{score.tokens:,}", *(f"{value:.4f}" for value in averages)))
        measured[name] = {
            "bytes": score.bytes, "characters": score.characters, "tokens": score.tokens, "nats": score.nats,
            "bits_per_byte": averages[0], "bits_per_character": averages[1], "nats_per_token": averages[2],
        }  # fmt: skip
    return {"files": measured}, rows


_MEASURES = {"blimp": _blimp, "lambada": _lambada, "bpb": _bits}
