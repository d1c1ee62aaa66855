"""What a checkpoint is: format, shape, parameters, files, state size. Reads headers, loads nothing."""

from __future__ import annotations

import argparse
import json

from mambakit.output import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="hub id, folder or .gguf file (default: the model that ships with mambakit)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    from mambakit.assets import default_model_path
    from mambakit.models.checkpoints import describe

    info = describe(args.model or default_model_path())
    if args.json:
        print(json.dumps(info.as_dict(), indent=2))
        return 0
    rows = [
        ("model", info.name),
        ("architecture", f"{info.architecture} ({info.format} format)"),
        ("parameters", f"{info.parameters:,}"),
        ("weights", ", ".join(f"{count:,} {dtype}" for dtype, count in info.dtypes.items())),
        *(("file", f"{file}, {size / 2**20:,.1f} MiB") for file, size in info.files.items()),
        ("state of one sequence", f"{info.state_bytes / 2**20:.2f} MiB, whatever its length"),
        ("tokenizer", "with the weights" if info.tokenizer else "none with the weights"),
        *((field, str(value)) for field, value in info.config.items()),
    ]
    table(("", ""), rows)
    return 0
