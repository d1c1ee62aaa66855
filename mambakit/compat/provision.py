"""`provide`: what is missing of mamba_ssm and causal_conv1d is mambakit's, and the table of what comes from where."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass

from mambakit.compat import installed
from mambakit.compat.finder import install, warn_of_replaced
from mambakit.compat.surface import EXTENSIONS, MODULES


@dataclass(frozen=True)
class Row:
    """A module: whether mambakit gives it, where it is installed, and why mambakit's serves or does not."""

    module: str
    given: bool
    place: str | None
    why: str


def rows(override: bool = False) -> list[Row]:
    """What `provide` would give, and what gives the rest. Extensions that are installed are loaded to see whether they
    load; nothing else is imported."""
    return [_row(name, override) for name in MODULES]


def _row(name: str, override: bool) -> Row:
    spec = installed.locate(name)
    place = None if spec is None else spec.origin
    if override:
        return Row(name, True, place, "override")
    if spec is not None and installed.is_bare_folder(spec):
        return Row(name, True, place, "a folder without __init__.py")
    if spec is None:
        top = name.partition(".")[0]
        missing = "not installed" if installed.locate(top) is None else f"the installed {top} does not have it"
        return Row(name, True, None, missing)
    reason = installed.why_replaced(name, spec)
    return Row(name, reason is not None, place, "installed" if reason is None else reason)


def provide(override: bool = False) -> dict[str, str]:
    """Give what is missing of ``mamba_ssm``, ``causal_conv1d`` and their extensions, for imports from now on.

    Code that is installed or lies beside the script wins, down to single modules. An extension that is installed and
    does not load is replaced, with a warning that says why. Without a CUDA device, extensions and Triton modules are
    replaced. Call it before the code that imports them is imported; a second call changes nothing.

    Args:
        override: mambakit's come first, whatever is installed.

    Returns:
        The modules that mambakit gives, and why each: {} where a complete installation serves.

    Raises:
        TypeError: ``override`` is no bool.

    What mambakit does not have, Mamba-2 and 3, raises an ImportError that says so where it is imported.
    """
    if not isinstance(override, bool):  # a module's name, say, would put ours in front of everything
        raise TypeError(f"provide: override is {override!r}; it must be True or False")
    found = rows(override)
    install(override)
    given = {row.module: row.why for row in found if row.given}
    for name in EXTENSIONS:
        if name in given and not override and (spec := installed.locate(name)) is not None:
            warn_of_replaced(name, spec, given[name])
    _warn_of_imported(given)
    return given


def _warn_of_imported(given: dict[str, str]) -> None:
    """Modules that were imported before from elsewhere, or looked for in vain by code that goes on without them."""
    early = [name for name in given if sys.modules.get(name) is not None and not _is_given(name)]
    blocked = [name for name in given if name in sys.modules and sys.modules[name] is None]
    bound = sorted(
        name for name in sys.modules
        if name.startswith("transformers.models.") and name.rpartition(".modeling_")[2] in _BINDING
    )  # fmt: skip
    first = "call mambakit.provide() first"
    for names, what, remedy in (
        (early, "imported before mambakit.provide(), which changes nothing there", first),
        (bound, "imported before mambakit.provide(), with functions of their own bound", first),
        (blocked, "None in sys.modules, so that Python imports nothing of that name", "delete the entry"),
    ):
        if names:
            warnings.warn(f"{', '.join(names)}: {what}; {remedy}", stacklevel=3)


# transformers' modelling files that look for mamba_ssm when they are imported.
_BINDING = ("mamba", "falcon_mamba", "jamba")


def _is_given(name: str) -> bool:
    spec = getattr(sys.modules[name], "__spec__", None)
    return spec is not None and spec.origin == "mambakit"
