"""Rewrite a checkpoint: between transformers' format and the original state-spaces format, to another dtype, or from
packed weights (`mambakit quantize`) to plain ones."""

from __future__ import annotations

import argparse

from mambakit.commands.loading import hide_progress_bars
from mambakit.commands.options import check_output_folder
from mambakit.output import say, terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="hub id or folder, in either format; packed weights are unpacked")
    parser.add_argument("target", help="a new folder")
    parser.add_argument(
        "--to", choices=("transformers", "original"), default="transformers", help="default: transformers"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the source's")


def run(args: argparse.Namespace) -> int:
    check_output_folder("target", args.target, new=True)

    import torch

    from mambakit.models.auto import AutoConfig
    from mambakit.models.checkpoints import convert
    from mambakit.models.quantization import is_quantized

    hide_progress_bars()
    folder = convert(args.source, args.target, args.to, None if args.dtype is None else getattr(torch, args.dtype))
    config = AutoConfig.from_pretrained(args.source)
    if is_quantized(config):
        format = config.quantization_config["format"]
        say(terminal(stderr=True), f"{args.source} is quantised ({format}): dequantised to plain weights")
    say(terminal(), str(folder))
    return 0
