"""What a checkpoint is: format, shape, parameters, files, state size. Reads headers, loads nothing."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="hub id or folder (default: the model that ships with mambakit)")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from mambakit.assets import default_model_path
    from mambakit.models.checkpoints import describe

    info = describe(args.model or default_model_path())
    if args.json:
        print(json.dumps(info.as_dict(), indent=2))
        return 0
    table = Table(show_header=False)
    table.add_row("model", info.name)
    table.add_row("architecture", f"{info.architecture} ({info.format} format)")
    table.add_row("parameters", f"{info.parameters:,}")
    table.add_row("weights", ", ".join(f"{count:,} {dtype}" for dtype, count in info.dtypes.items()))
    for file, size in info.files.items():
        table.add_row("file", f"{file}, {size / 2**20:,.1f} MiB")
    table.add_row("state of one sequence", f"{info.state_bytes / 2**20:.2f} MiB, whatever its length")
    table.add_row("tokenizer", "in the folder" if info.tokenizer else "not in the folder")
    for field, value in info.config.items():
        table.add_row(field, str(value))
    Console().print(table)
    return 0
