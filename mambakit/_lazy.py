"""Public names of a package, each imported from its module when it is first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, homes: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` (PEP 562) of ``package``.

    Args:
        homes: public name -> the module that defines it. A submodule's own name maps to that submodule.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807, the hook that Python looks for
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(homes[name])
        value = module if homes[name] == f"{package}.{name}" else getattr(module, name)
        vars(sys.modules[package])[name] = value  # the next use finds it without this call
        return value

    def __dir__() -> list[str]:  # noqa: N807
        return sorted({*vars(sys.modules[package]), *homes})

    return __getattr__, __dir__
