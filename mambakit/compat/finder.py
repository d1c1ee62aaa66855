"""The finders on ``sys.meta_path``: what is missing comes last, what is replaced comes first.

A finder, and no modules put into ``sys.modules``: `importlib.util.find_spec` then answers as for an installed package,
and code that is installed or vendored is found first.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from mambakit.compat import installed
from mambakit.compat.replaced import GivenModule, forget
from mambakit.compat.surface import (
    ABSENT,
    BOUND,
    DISTRIBUTIONS,
    MODULES,
    UNUSABLE,
    VERSIONS,
    absent_message,
    is_package,
)

_ORIGIN = "mambakit"
_NAMES = MODULES | UNUSABLE


class Loader(importlib.abc.Loader):
    """Makes a module of the table."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return GivenModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if name in ABSENT:
            raise ImportError(absent_message(name, ABSENT[name]), name=name)
        names = _NAMES[name]
        forget(module)
        module.__doc__ = f"{name}, given by mambakit (docs/guides/dropin.md)."
        module.__file__ = str(Path(__file__).with_name("__init__.py"))
        if "." not in name:
            module.__dict__["__version__"] = VERSIONS.get(name, VERSIONS["mamba_ssm"])
        module.__dict__["__all__"] = sorted({*(n for n in names if not n.startswith("_")), *BOUND.get(name, ())})
        module.__dict__["__getattr__"] = _attributes(module, names)
        module.__dict__["__dir__"] = lambda: sorted(
            {*module.__dict__, *module.__dict__["__all__"], *names, *_submodules(name)}
        )


def _attributes(module: ModuleType, names: dict[str, str]) -> Any:
    """A module's ``__getattr__``: names, and a package's submodules, are imported when they are first asked for."""
    package = module.__name__

    def __getattr__(name: str) -> Any:  # noqa: N807, the hook that Python looks for
        whole = f"{package}.{name}"
        if name in names:
            place, _, ours = names[name].partition(":")
            value = getattr(importlib.import_module(place), ours)
            module.__dict__[name] = value
            return value
        if name in BOUND.get(package, ()):
            return importlib.import_module(name)
        if whole in _NAMES:
            return importlib.import_module(whole)
        if whole in ABSENT:
            raise AttributeError(absent_message(whole, ABSENT[whole]))
        raise AttributeError(f"module {package!r} (mambakit's) has no attribute {name!r}")

    return __getattr__


def _submodules(package: str) -> list[str]:
    return [name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == package]


def _spec(name: str, folders: Sequence[str] = ()) -> importlib.machinery.ModuleSpec:
    """The module of the table; submodules are looked for in ``folders`` before they are ours."""
    spec = importlib.machinery.ModuleSpec(name, Loader(), origin=_ORIGIN, is_package=is_package(name))
    if spec.submodule_search_locations is not None:
        spec.submodule_search_locations.extend(folders)
    return spec


class MissingFinder(importlib.abc.MetaPathFinder):
    """The last finder: what no other has found."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname in MODULES:
            return _spec(fullname)
        if (fullname in ABSENT or fullname in UNUSABLE) and _is_ours(fullname.rpartition(".")[0]):
            return _spec(fullname)
        return None

    def find_distributions(self, context: Any = None) -> Iterator[metadata.Distribution]:
        return iter(()) if FRONT.override else _distributions(context, lambda name: installed.locate(name) is None)


def _distributions(context: Any, given: Callable[[str], bool]) -> Iterator[metadata.Distribution]:
    """The versions of packages that are given whole, for `importlib.metadata`, and so for pip.

    They are in no folder: whatever folders are asked about, they are there, as the modules are.
    """
    wanted = getattr(context, "name", None)
    for package, name in DISTRIBUTIONS.items():
        if (wanted is None or re.sub("[-_.]+", "-", wanted).lower() == name) and given(package):
            yield _Distribution(package, name)


class _Distribution(metadata.Distribution):
    def __init__(self, package: str, name: str):
        self._files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSIONS[package]}\n",
            "top_level.txt": f"{package}\n",
        }

    def read_text(self, filename: str) -> str | None:
        return self._files.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


def _is_ours(package: str) -> bool:
    module = sys.modules.get(package)
    spec = getattr(module, "__spec__", None)
    return spec is not None and spec.origin == _ORIGIN


class FrontFinder(importlib.abc.MetaPathFinder):
    """The first finder: installed modules that do not serve here; with ``override`` everything that mambakit has."""

    override = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if self.override:
            return _spec(fullname) if fullname in _NAMES or fullname in ABSENT else None
        if fullname not in (*DISTRIBUTIONS, *installed.EXTENSIONS, *installed.TRITON):
            return None
        spec = installed.locate_in(fullname, path)
        if spec is None:
            return None
        if fullname in DISTRIBUTIONS:  # a folder of that name beside the script is no package yet
            return _spec(fullname, spec.submodule_search_locations or ()) if installed.is_bare_folder(spec) else spec
        reason = installed.why_replaced(fullname, spec)
        if reason is not None:
            warn_of_replaced(fullname, spec, reason)
            return _spec(fullname)
        module = installed.loaded_extension(fullname, spec) if fullname in installed.EXTENSIONS else None
        if module is not None:
            spec.loader = installed.Loaded(module)  # type: ignore[assignment]
        return spec

    def find_distributions(self, context: Any = None) -> Iterator[metadata.Distribution]:
        """In front of an installed one's, of which transformers asks the version."""
        return _distributions(context, lambda name: True) if self.override else iter(())


_WARNED: set[str] = set()


def warn_of_replaced(name: str, spec: importlib.machinery.ModuleSpec, reason: str) -> None:
    """Once for each extension that is there and does not load; without a CUDA device nothing else is to be expected."""
    if name in installed.EXTENSIONS and reason.startswith("it does not load") and name not in _WARNED:
        _WARNED.add(name)
        warnings.warn(
            f"mambakit serves in place of {spec.origin}: {reason}. Install a build for this PyTorch, or uninstall it",
            stacklevel=2,
        )


FRONT, MISSING = FrontFinder(), MissingFinder()


def install(override: bool) -> None:
    """Put both finders in their places; a second call changes nothing, or adds ``override``.

    Finders of this module as it was before it was loaded again leave theirs; their ``override`` stays.
    """
    ours = [f for f in sys.meta_path if type(f).__module__ == __name__ and f not in (FRONT, MISSING)]
    FRONT.override = FRONT.override or override or any(getattr(f, "override", False) for f in ours)
    for finder in ours:
        sys.meta_path.remove(finder)
    if FRONT not in sys.meta_path:
        sys.meta_path.insert(0, FRONT)
    if MISSING not in sys.meta_path:
        sys.meta_path.append(MISSING)
