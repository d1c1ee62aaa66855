"""Reading TOML files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from mambakit.errors import UsageError


def read_toml(file: str | os.PathLike, what: str = "configuration file") -> dict[str, Any]:
    """The tables of a file; ``what`` it is called in errors.

    Raises:
        UsageError: it is not there, cannot be read, or is not TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    path = Path(file)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"there is no {what} {path}") from error
    except OSError as error:
        raise UsageError(f"the {what} {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not TOML, or not UTF-8
        raise UsageError(f"{path} is not valid TOML: {error}") from error
