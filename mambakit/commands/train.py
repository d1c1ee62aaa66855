"""`mambakit train CONFIG key=value ...`: from text files to a model folder."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a TOML file; its fields are those of mambakit.training.config.TrainConfig")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help='fields to change, e.g. learning_rate=1e-3 \'train_files=["a.txt","b.txt.xz"]\' out=runs/mine',
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from mambakit.training.config import load_config
    from mambakit.training.loop import train

    config = load_config(args.config, args.overrides)
    if not config.train_files:
        raise ValueError("train_files is empty; name text files: 'train_files=[\"my_text.txt\"]'")
    try:
        train(config, Console(stderr=True))
    except KeyboardInterrupt:
        Console(stderr=True).print(f"stopped; continue with resume=true (checkpoint in {config.out}/checkpoint)")
        return 130
    return 0
