"""Versions, devices, what serves each op on each of them, what `mambakit run` would give, and a model's decoders."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from mambakit.commands.loading import add_model_arguments, load
from mambakit.commands.options import integer
from mambakit.output import table, terminal

if TYPE_CHECKING:
    from mambakit.compat import Row as Given
    from mambakit.decoding.registry import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--rows",
        type=integer(1),
        help="with a model: which decoder writes so many texts at once, and why the others do not",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from mambakit.compat import rows as of_mamba_ssm
    from mambakit.ops.implementations import implementations

    versions, devices, rows = _versions(), _devices(), implementations()
    given = of_mamba_ssm()
    decoders = _decoders(args)
    if args.json:
        report: dict[str, Any] = {
            "versions": versions, "devices": devices, "implementations": [asdict(row) for row in rows],
            "mamba_ssm": [asdict(row) for row in given],
        }  # fmt: skip
        if decoders:
            report["decoders"] = [asdict(row) for row in decoders]
        print(json.dumps(report, indent=2))
        return 0
    console = terminal()
    for title, columns, lines in (
        ("Versions", ("package", "version"), list(versions.items())),
        ("Devices", ("device", "what it is"), list(devices.items())),
        ("Ops", ("op", "device", "served by", "remedy"), [(r.op, r.device, r.serves, r.remedy) for r in rows]),
        ("With mambakit.provide() or `mambakit run`", ("module", "given by", "why"), _given(given)),
    ):
        table(columns, lines, title, console)
    if decoders:
        from mambakit.decoding.registry import describe

        title = f"Decoders of {args.rows or 1} row{'s' * ((args.rows or 1) > 1)}"
        table(("decoder", "serves, or why not"), [(row.decoder, describe(row)) for row in decoders], title, console)
    return 0


def _given(rows: Sequence[Given]) -> list[tuple[str, str, str]]:
    """A line for each module; one for a package of which all has the same source."""
    lines: list[tuple[str, str, str]] = []
    whole = ""
    for row in rows:
        if whole and row.module.startswith(whole):
            continue
        by = "mambakit" if row.given else str(row.place)
        inside = [r for r in rows if r.module.startswith(f"{row.module}.")]
        same = bool(inside) and all((r.given, r.why) == (row.given, row.why) for r in inside)
        whole = f"{row.module}." if same else ""
        lines.append((f"{row.module}.*" if same else row.module, by, row.why))
    return lines


def _decoders(args: argparse.Namespace) -> list[Row]:
    """The registry's table for the model that is asked about; nothing where none is."""
    if all(given is None for given in (args.model, args.rows, args.device, args.dtype)):
        return []
    from mambakit.decoding.registry import table_of

    model, _ = load(args, inference=True)
    return table_of(model, args.rows or 1)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    packages = "mambakit torch transformers tokenizers safetensors triton cuda-bindings peft"
    for package in packages.split():
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _devices() -> dict[str, str]:
    import torch

    threads = torch.get_num_threads()
    devices: dict[str, Any] = {"cpu": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"}
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
    return devices


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except FileNotFoundError:
        pass  # not Linux
    return platform.processor() or platform.machine()
