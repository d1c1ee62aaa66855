"""What a shape takes on a device: memory, tokens a second that recorded benchmarks lead one to expect, and a recipe."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambakit.commands.options import check_output_file, integer
from mambakit.errors import UsageError
from mambakit.output import say, table, terminal

if TYPE_CHECKING:
    from mambakit.planning.estimate import Estimate
    from mambakit.planning.shape import Shape

# Options that are fields of a shape.
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "state_size", "expand", "conv_kernel")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="130m",
        help="130m, 370m, 790m, 1.4b, 2.8b, a training configuration (.toml), a hub id, folder or .gguf file "
        "(default: 130m)",
    )  # fmt: skip
    for name in _SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=integer(1, 2**24), metavar="N", help="in its place")
    parser.add_argument(
        "--device", default="here", help="h100, h200, cpu, or here: this machine's GPU, else its CPU (default)"
    )
    parser.add_argument("--batch-size", type=integer(1), metavar="N", help="rows of a training step, texts at a time")
    parser.add_argument("--sequence-length", type=integer(1), metavar="N", help="tokens of a row (default 1024)")
    parser.add_argument("--tokens", type=integer(1, 2**53), metavar="N", help="to train on (default: 20 a parameter)")
    parser.add_argument("--recipe", metavar="FILE", help="write the training recipe to this .toml file")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    if args.recipe:
        if not args.recipe.endswith(".toml"):
            raise UsageError(f"--recipe is {args.recipe!r}; a configuration has a name that ends with .toml")
        check_output_file("--recipe", args.recipe)
    from mambakit.planning.devices import device
    from mambakit.planning.estimate import FORMATS, generating
    from mambakit.planning.recipe import recipe
    from mambakit.writing import replace_text

    shape, length, batch = _shape(args)
    target = device(args.device)
    plan = recipe(shape, target, length, batch, args.tokens)
    texts = args.batch_size or 1
    formats = {name: generating(shape, target, texts, name) for name in FORMATS}
    if args.recipe:
        replace_text(Path(args.recipe), plan.toml())
    if args.json:
        found = {
            "shape": dataclasses.asdict(shape), "parameters": shape.parameters, "device": target.name,
            "records": target.sources, "recipe": plan.fields, "tokens": plan.tokens, "seconds": plan.seconds,
            "training": _plain(plan.estimate), "generating": {name: _plain(e) for name, e in formats.items()},
        }  # fmt: skip
        print(json.dumps(found, indent=2))
        return 0
    rows = plan.fields["batch_size"] // plan.fields["accumulate"]  # type: ignore[operator]
    made = [
        ("model", f"{shape.parameters:,} parameters: {shape.num_hidden_layers} layers of {shape.hidden_size}"),
        ("device", target.name + (f", {target.gib:,.1f} GiB" if target.gib else "")),
        (f"training, {rows} x {length:,} tokens at a time", _shown(plan.estimate, target)),
        (f"training on {plan.tokens:,} tokens", _duration(plan.seconds)),
        *((f"writing, {name}, {texts} at a time", _shown(e, target)) for name, e in formats.items()),
        ("state of a text", f"{shape.state_bytes(2) / 2**20:,.2f} MiB in bfloat16, whatever its length"),
    ]
    table(("", ""), made)
    console = terminal()
    # A device's note is everywhere; one line says it.
    for note in dict.fromkeys([*plan.estimate.notes, *(n for e in formats.values() for n in e.notes)]):
        say(console, f"note: {note}")
    say(console, f"from: {', '.join(f'docs/benchmarks/{name}.json' for name in target.sources)}")
    if plan.remedy:
        say(console, plan.remedy)
    if args.recipe:
        say(console, f"recipe written to {args.recipe}: mambakit train {args.recipe} 'train_files=[\"my_text.txt\"]'")
    else:
        say(console, "\n# a recipe (--recipe plan.toml writes it):\n" + plan.toml().rstrip())
    return 0


def _shape(args: argparse.Namespace) -> tuple[Shape, int, int | None]:
    """(shape, tokens of a row, rows of a step or None)."""
    from mambakit.planning.shape import PUBLISHED, Shape

    length, batch = 1024, None
    if args.model in PUBLISHED:
        shape = PUBLISHED[args.model]
    elif args.model.endswith(".toml"):
        from mambakit.training.config_file import load_config

        config = load_config(args.model, [])
        length, batch = config.sequence_length, config.batch_size
        if config.init_from:
            from mambakit.models.auto import AutoConfig

            shape = Shape.of(AutoConfig.from_pretrained(config.init_from))
        else:
            shape = Shape.of(config)
    else:
        from mambakit.models.auto import AutoConfig

        shape = Shape.of(AutoConfig.from_pretrained(args.model))
    changed = {name: value for name in _SIZES if (value := getattr(args, name)) is not None}
    return (
        dataclasses.replace(shape, **changed),
        args.sequence_length or length,
        args.batch_size if args.batch_size is not None else batch,
    )


def _shown(estimate: Estimate, device: Any) -> str:
    parts = ", ".join(f"{gib:,.2f} {what}" for what, gib in estimate.gib.items())
    fits = "" if estimate.fits(device) else "; does NOT fit"
    rate = "" if estimate.tokens_per_second is None else f"{_rounded(estimate.tokens_per_second)} tokens/s; "
    return f"{rate}{estimate.total:,.2f} GiB ({parts}){fits}"


def _rounded(rate: float) -> str:
    """Two digits that mean something: an estimate has no more."""
    from math import floor, log10

    digits = max(0, 1 - floor(log10(rate))) if rate < 10 else 0
    return f"{round(rate, digits if rate < 10 else 1 - floor(log10(rate))):,.{digits}f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"about {seconds / size:,.0f} {name}"
    return f"about {seconds:.0f} seconds"


def _plain(estimate: Estimate) -> dict[str, Any]:
    return {
        "gib": estimate.gib, "total_gib": estimate.total, "tokens_per_second": estimate.tokens_per_second,
        "notes": estimate.notes,
    }  # fmt: skip
