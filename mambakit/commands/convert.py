"""Rewrite a checkpoint: between transformers' format and the original state-spaces format, or to another dtype."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="hub id or folder, in either format")
    parser.add_argument("target", help="a new folder")
    parser.add_argument(
        "--to", choices=("transformers", "original"), default="transformers", help="default: transformers"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the source's")


def run(args: argparse.Namespace) -> int:
    import torch
    import transformers

    from mambakit.models.checkpoints import convert

    transformers.utils.logging.disable_progress_bar()
    folder = convert(args.source, args.target, args.to, None if args.dtype is None else getattr(torch, args.dtype))
    print(folder)
    return 0
