"""Rewrite a checkpoint: between transformers' format, the original state-spaces format and llama.cpp's GGUF, to another
dtype, or from packed weights (`mambakit quantize`, GGUF's Q8_0 and Q4_0) or adapters to plain ones."""

from __future__ import annotations

import argparse

from mambakit.commands.loading import hide_progress_bars
from mambakit.commands.options import check_output_folder, dtype_name
from mambakit.output import say, terminal

_BLOCKS = ("q8_0", "q4_0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="hub id, folder or .gguf file, in any format; packed weights are unpacked, adapters merged"
    )
    parser.add_argument("target", help="a new folder, or a new .gguf file")
    parser.add_argument(
        "--to", choices=("transformers", "original", "gguf"), help="default: transformers; gguf for a .gguf target"
    )
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=("float32", "bfloat16", "float16", *_BLOCKS),
        help="default: the source's, packed weights become plain ones; q8_0 and q4_0 for GGUF alone; F32, F16, BF16 "
        "are other names",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="write the weights alone")


def run(args: argparse.Namespace) -> int:
    to = args.to or ("gguf" if args.target.endswith(".gguf") else "transformers")
    if args.dtype in _BLOCKS and to != "gguf":
        raise ValueError(f"--dtype {args.dtype} is GGUF's; give a target that ends with .gguf, or another dtype")
    if to != "gguf":
        check_output_folder("target", args.target, new=True)

    import torch

    from mambakit.models.auto import AutoConfig
    from mambakit.models.checkpoints import convert
    from mambakit.models.quantization import is_quantized

    hide_progress_bars()
    dtype = args.dtype if args.dtype in _BLOCKS or args.dtype is None else getattr(torch, args.dtype)
    place = convert(args.source, args.target, to, dtype, tokenizer=not args.no_tokenizer)
    config = AutoConfig.from_pretrained(args.source)
    if is_quantized(config):
        format = config.quantization_config["format"]
        say(terminal(stderr=True), f"{args.source} is quantised ({format}): dequantised to plain weights")
    say(terminal(), str(place))
    return 0
