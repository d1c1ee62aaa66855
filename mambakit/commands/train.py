"""`mambakit train CONFIG key=value ...`: from files of text, DNA or sound to a model folder; fine-tuning too."""

from __future__ import annotations

import argparse
import os
import shlex
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a TOML file; its fields are those of mambakit.training.config.TrainConfig")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help='fields to change, e.g. learning_rate=1e-3 \'train_files=["a.txt","b.txt.xz"]\' out=runs/mine',
    )


def run(args: argparse.Namespace) -> int:
    import transformers
    from rich.console import Console

    from mambakit.training.config import load_config
    from mambakit.training.loop import RunInterrupted, train

    config = load_config(args.config, args.overrides)
    if not config.train_files:
        raise ValueError("train_files is empty; name files: 'train_files=[\"my_text.txt\"]'")
    transformers.utils.logging.disable_progress_bar()  # the run has its own
    try:
        train(config, Console(stderr=True), Console())
    except RunInterrupted as stop:
        if str(stop):
            kept = [text for text in args.overrides if text.partition("=")[0].strip() not in ("resume", "overwrite")]
            command = shlex.join(["mambakit", "train", args.config, *kept, "resume=true"])
            print(f"{stop}\ncontinue with it: {command}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # torchrun starts several of these
            print(f"stopped before the first step: nothing in {config.out} has changed", file=sys.stderr)
        return 130
    return 0
