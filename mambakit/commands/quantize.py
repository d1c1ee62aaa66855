"""Write a checkpoint with packed weights: int8, fp8 or int4 (1/2, 1/2, 1/4 of bfloat16's bytes), or lossless (3/4)."""

from __future__ import annotations

import argparse

from mambakit.commands.loading import hide_progress_bars
from mambakit.commands.options import check_output_folder
from mambakit.output import say, terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="hub id, folder or .gguf file; one that is quantised already is packed anew from its rounded weights, and "
        "adapters are merged",
    )
    parser.add_argument("target", help="a new folder")
    parser.add_argument(
        "--to",
        choices=("int8", "int4", "fp8", "lossless"),
        default="int8",
        help="default: int8; fp8: for GPUs that have it",
    )
    parser.add_argument(
        "--group", type=int, choices=(32, 64, 128), help="weights to a scale (default 64; of int8 and int4 alone)"
    )


def run(args: argparse.Namespace) -> int:
    check_output_folder("target", args.target, new=True)

    from pathlib import Path

    from mambakit.models.checkpoints.conversion import copy_tokenizer, load_language_model
    from mambakit.models.quantization import check_group, is_quantized

    hide_progress_bars()
    target = Path(args.target)
    check_group(args.to, args.group, "--group")  # before anything is loaded
    model, place = load_language_model(args.source, "quantize", "auto")
    if is_quantized(model.config):
        format = model.config.quantization_config["format"]
        say(terminal(stderr=True), f"{args.source} is quantised ({format}): its rounded weights are packed anew")
    model.quantize(args.to, args.group)
    model.save_pretrained(target)
    copy_tokenizer(place, target)
    size = sum(file.stat().st_size for file in target.glob("*.safetensors")) / 2**20
    say(terminal(), f"{target}: {size:.1f} MiB of weights")
    return 0
