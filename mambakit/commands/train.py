"""`mambakit train CONFIG key=value ...`: from files of text, DNA or sound to a model folder; fine-tuning too."""

from __future__ import annotations

import argparse
import os
import shlex

from mambakit.commands.loading import hide_progress_bars
from mambakit.commands.options import check_output_folder
from mambakit.errors import UsageError
from mambakit.output import say, terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a TOML file; its fields are those of mambakit.training.config.TrainConfig")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help='fields to change, e.g. learning_rate=1e-3 \'train_files=["a.txt","b.txt.xz"]\' out=runs/mine',
    )


def run(args: argparse.Namespace) -> int:
    from mambakit.training.config_file import load_config

    config = load_config(args.config, args.overrides)
    if not config.train_files:
        raise UsageError("train_files is empty; name files: 'train_files=[\"my_text.txt\"]'")
    check_output_folder("out", config.out)
    from mambakit.training.loop import RunInterrupted, train  # after the checks, which need not wait for it

    hide_progress_bars()  # the run has its own
    try:
        train(config, terminal(stderr=True), terminal())
    except RunInterrupted as stop:
        if str(stop):
            kept = [text for text in args.overrides if text.partition("=")[0].strip() not in ("resume", "overwrite")]
            command = shlex.join(["mambakit", "train", args.config, *kept, "resume=true"])
            say(terminal(stderr=True), str(stop))
            say(terminal(stderr=True), f"continue with it: {command}")
        return 130
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # torchrun starts several of these
            say(terminal(stderr=True), f"stopped before the first step: nothing in {config.out} has changed")
        return 130
    return 0
