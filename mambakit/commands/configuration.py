"""A TOML file of a command's options. Its names are theirs without the dashes in front; lists are repeated options.

The command line's own options replace the file's.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

from mambakit.commands.options import Number, Repeated
from mambakit.errors import UsageError
from mambakit.quoting import quoted
from mambakit.toml_files import read_toml

OPTION = "--config"
_NEVER = {"config", "help", "debug", "make_key"}  # of one call, not of a service


def add_config_argument(parser: Any) -> None:
    parser.add_argument(
        OPTION, metavar="FILE", help="a TOML file of these options, as slots = 16; those of the command line replace it"
    )
    parser.rewrite = lambda arguments: with_file(parser, arguments)


def with_file(parser: Any, arguments: Sequence[str]) -> list[str]:
    """``arguments`` with those of its --config file before them.

    Raises:
        UsageError: the file cannot be read, or an option in it is unknown or of another type.
    """
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument(OPTION)
    try:
        file = finder.parse_known_args(list(arguments))[0].config
    except SystemExit:  # without a value; the parser itself says so
        return list(arguments)
    if not file:
        return list(arguments)
    given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    options = _options(parser)
    found: list[str] = []
    for name, value in read_toml(file).items():
        if isinstance(value, dict):
            raise UsageError(f"{file}: there are no tables, as {quoted(name)}; write options as name = value")
        action = options.get(name.replace("-", "_"))
        if action is None:
            near = difflib.get_close_matches(name.replace("_", "-"), [o.replace("_", "-") for o in options], 1)
            hint = f"did you mean {near[0]}?" if near else "mambakit serve --help lists them, without --"
            raise UsageError(f"{file}: there is no option {quoted(name)}; {hint}")
        if not given & set(action.option_strings):
            found += _arguments(f"{file}: {name}", action, value)
    return [*found, *arguments]


def _options(parser: Any) -> dict[str, argparse.Action]:
    found = {
        option[2:].replace("-", "_"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    return {name: action for name, action in found.items() if name not in _NEVER}


def _arguments(where: str, action: argparse.Action, value: Any) -> list[str]:
    option = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"{where} is {quoted(value)}; it must be true or false")
        return [option] if value else []
    if action.nargs == "+" or isinstance(action, Repeated):
        items = value if isinstance(value, list) else [value]
        if not items:
            raise UsageError(f"{where} is empty; give a list, or leave it out")
        texts = [_text(where, action, item) for item in items]
        return [option, *texts] if action.nargs == "+" else [f"{option}={text}" for text in texts]
    return [f"{option}={_text(where, action, value)}"]


def _text(where: str, action: argparse.Action, value: Any) -> str:
    kind = action.type.kind if isinstance(action.type, Number) else action.type
    if kind is int:
        fits, expected = type(value) is int, "a whole number"
    elif kind is float:
        fits, expected = type(value) in (int, float), "a number"
    else:
        fits, expected = isinstance(value, str), "a string"
    if not fits:
        raise UsageError(f"{where} is {quoted(value)}; it must be {expected}")
    return str(value)
