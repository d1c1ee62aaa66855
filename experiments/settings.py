"""An experiment's settings: one flat dataclass, every field a flag of its command."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

S = TypeVar("S", bound="Settings")


def option(default: Any, explanation: str) -> Any:
    """A field with its default and the explanation that `--help` prints."""
    return dataclasses.field(default=default, metadata={"help": explanation})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What every experiment is told."""

    out: str = option("runs/experiments", "folder of the results, NAME.json")
    data: str = option("data", "folder of the data files, laid out as experiments/README.md says")
    seeds: tuple[int, ...] = option((0, 1, 2), "one run for each")
    budget_seconds: float = option(0.0, "stop after this long, and record how far it got; 0: no limit")
    device: str = option("auto", "cpu, cuda, or auto: CUDA where there is one")
    eager: bool = option(False, "on CUDA, do not capture the training step as a graph")


def parse(cls: type[S], arguments: list[str] | None, description: str) -> S:
    """Read ``arguments`` (the command line's when None) into ``cls``; tuples take any number of values."""
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        flag = "--" + field.name.replace("_", "-")
        hint, text = hints[field.name], field.metadata["help"]
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        elif get_origin(hint) is tuple:
            parser.add_argument(flag, type=get_args(hint)[0], nargs="+", default=field.default, help=text)
        else:
            parser.add_argument(flag, type=hint, default=field.default, help=text)
    values: dict[str, Any] = vars(parser.parse_args(arguments))
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return cls(**given)
