"""What Python finds of mamba_ssm, causal_conv1d and the extensions without mambakit, and why it may not do."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

from mambakit.compat.surface import EXTENSIONS, TRITON

_CANNOT_LOAD = (ImportError, OSError)  # a symbol that PyTorch no longer has; a library that is not there


def locate(name: str) -> importlib.machinery.ModuleSpec | None:
    """The module's specification by every finder but mambakit's. Nothing is imported, parents neither."""
    path = None
    parent = name.rpartition(".")[0]
    if parent:
        found = locate(parent)
        if found is None or found.submodule_search_locations is None:
            return None
        path = found.submodule_search_locations
    return locate_in(name, path)


def locate_in(name: str, path: Any) -> importlib.machinery.ModuleSpec | None:
    """`locate` where the parent's search path is known."""
    for finder in sys.meta_path:
        if not type(finder).__module__.startswith("mambakit.compat."):
            find = getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path)
            if spec is not None:
                return spec
    return None


def is_bare_folder(spec: importlib.machinery.ModuleSpec) -> bool:
    """A folder without ``__init__.py``, which Python takes for a package."""
    return spec.origin is None and spec.submodule_search_locations is not None


@functools.cache
def has_cuda() -> bool:
    """Whether PyTorch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


class Loaded:
    """The loader of an extension that was loaded when it was tried."""

    def __init__(self, module: ModuleType):
        self._module = module

    def create_module(self, spec: Any) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        pass


_TRIED: dict[tuple[str, str | None], tuple[str | None, ModuleType | None]] = {}


def why_replaced(name: str, spec: importlib.machinery.ModuleSpec) -> str | None:
    """Why an installed module does not serve here, or None: it does, or is none that is replaced.

    A Triton module needs a CUDA device. So does an extension, which must load besides; that is tried once.
    """
    if name in TRITON:
        return None if has_cuda() else "there is no CUDA device"
    if name not in EXTENSIONS:
        return None
    reason, _ = _try(name, spec)
    return reason


def loaded_extension(name: str, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
    """The extension that `why_replaced` has loaded."""
    return _try(name, spec)[1]


def _try(name: str, spec: importlib.machinery.ModuleSpec) -> tuple[str | None, ModuleType | None]:
    key = (name, spec.origin)
    if key not in _TRIED:
        _TRIED[key] = _load(spec)
    return _TRIED[key]


def _load(spec: importlib.machinery.ModuleSpec) -> tuple[str | None, ModuleType | None]:
    import torch  # noqa: F401, loads the libraries that the extension is linked with

    try:
        module = importlib.util.module_from_spec(spec)
        assert spec.loader is not None
        spec.loader.exec_module(module)
    except _CANNOT_LOAD as error:
        return f"it does not load: {error}", None
    return (None if has_cuda() else "there is no CUDA device"), module
