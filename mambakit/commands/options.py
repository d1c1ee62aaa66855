"""Options that are checked where they are read: nothing empty, numbers within limits, paths that can be written.

`Parser` checks every string by itself. A number is given its limits as its type (`integer`, `real`). A text that may be
blank has the type `text`; one that may even be empty, `any_text`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mambakit.errors import UsageError
from mambakit.quoting import brief, cut
from mambakit.writing import replaceable

_LARGEST_INTEGER = 2**31 - 1
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Number:
    """The type of an option that is a number, and its limits."""

    kind: type
    low: float
    high: float
    above: bool = False
    """``low`` itself is outside."""

    def __call__(self, text: str) -> Any:
        try:
            return self.kind(text)
        except ValueError as error:
            what = "a whole number" if self.kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{brief(text, 40)} is not {what}") from error

    def check(self, name: str, value: Any) -> None:
        if self.low <= value <= self.high and not (self.above and value == self.low):
            return
        least = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        unlimited = self.high in (sys.float_info.max, _LARGEST_INTEGER)
        if unlimited and value <= self.high:
            limits = least
        elif unlimited:
            limits = f"{least}, and at most {self.high}" if self.kind is int else f"a finite number, {least}"
        else:
            limits = f"{least}, and at most {self.high:g}" if self.kind is float else f"from {self.low} to {self.high}"
        raise UsageError(f"{name} is {cut(str(value), 40)}; it must be {limits}")


def integer(low: int, high: int = _LARGEST_INTEGER) -> Number:
    return Number(int, low, high)


def real(low: float, high: float = sys.float_info.max, above: bool = False) -> Number:
    return Number(float, low, high, above)


def require_with(option: str, given: bool, other: str, used: bool) -> None:
    """UsageError where ``option`` is given without ``other``, without which it would have no effect."""
    if given and not used:
        raise UsageError(f"{option} has no effect without {other}; add {other}, or drop {option}")


def text(value: str) -> str:
    """The type of an option that is text, of which blanks are a part."""
    return value


def any_text(value: str) -> str:
    """The type of text that may be empty."""
    return value


# Other names of dtypes: llama.cpp's, and short ones.
_DTYPES = {
    "f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16", "half": "float16", "bf16": "bfloat16",
}  # fmt: skip


def dtype_name(value: str) -> str:
    """The type of an option that names a dtype: PyTorch's name of it, in small letters."""
    return _DTYPES.get(value.lower(), value.lower())


class Parser(argparse.ArgumentParser):
    """argparse's, which checks values as they are read (UsageError) and says which option was meant.

    Attributes:
        commands: the parsers of the words that may come next, by word.
        rewrite: what is done with the arguments before they are read; None: nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        # Not by their first letters: --prompt would be --prompt-lookup, and a later option may share them.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.commands: dict[str, Parser] = {}
        self.rewrite: Callable[[Sequence[str]], list[str]] | None = None
        for name in (None, "store"):
            self.register("action", name, _Store)
        self.register("action", "append", Repeated)
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        self.set_defaults(parser=self)  # the innermost one that took part

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args if self.rewrite is None else self.rewrite(args), namespace)

    def option_names(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def unknown(self, arguments: list[str]) -> NoReturn:
        """Refuse arguments that no command has."""
        wrong = next((a for a in arguments if a.startswith("-")), arguments[0]).partition("=")[0]
        near = difflib.get_close_matches(wrong, set(self.option_names()) - {"--help", "--debug"}, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        self.error(f"unrecognized arguments: {' '.join(arguments)}{meant}")


class _Checked(argparse.Action):
    @property
    def _name(self) -> str:
        return self.option_strings[-1] if self.option_strings else str(self.metavar or self.dest)

    def _check(self, value: Any) -> Any:
        for item in value if isinstance(value, list) else [value]:
            if (
                isinstance(item, str)
                and self.type is not any_text
                and not (item if self.type is text else item.strip())
            ):
                raise UsageError(f"{self._name} is empty; give it a value, or leave it out (is a variable not set?)")
            if self.type in (text, any_text) and isinstance(item, str) and not _encodable(item):
                raise UsageError(f"{self._name} holds bytes that are not UTF-8 text; convert it")
            if isinstance(self.type, Number) and item is not None:
                self.type.check(self._name, item)
        return value


class _Store(_Checked):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, self._check(values))


class Repeated(_Checked):
    """Of an option that may be repeated: its values are a list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), self._check(values)])


def _encodable(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


# -- paths that will be written ----------------------------------------------------------------------------------------


def check_output_file(name: str, value: str) -> None:
    """UsageError unless a file can be written under this path; ``name`` is the option's."""
    path = Path(value)
    if path.is_dir() or value.endswith(("/", os.sep)):
        raise UsageError(f"{name} {value} is a folder; give the name of a file")
    if not path.parent.exists():
        raise UsageError(f"{name} {value}: there is no folder {path.parent}; make it first, or name another")
    try:
        target = replaceable(path)
    except UsageError as error:
        raise UsageError(f"{name} {error}") from error
    _require_writable(name, value, target.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise UsageError(f"{name} {value} cannot be written over; name another file")


def check_output_folder(name: str, value: str, new: bool = False) -> None:
    """UsageError unless a folder is or can be made under this path, and written to.

    Args:
        new: what is there already must be an empty folder.
    """
    path = Path(value)
    if new and path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{path} is not empty; name a new folder")
    existing = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    _require_writable(name, value, existing)


def _require_writable(name: str, value: str, folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{name} {value}: {folder} is not a folder; name another place")
    try:
        with tempfile.TemporaryFile(dir=folder):  # the one test that holds for every file system and user
            pass
    except OSError as error:
        raise UsageError(
            f"{name} {value}: nothing can be written in {folder} ({error.strerror}); name another place"
        ) from error
