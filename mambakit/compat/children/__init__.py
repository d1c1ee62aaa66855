"""How the processes of `mambakit run` come by what `mambakit.provide` gives, the processes that they start included.

A folder with a ``sitecustomize.py`` goes in front of PYTHONPATH: Python imports that module when a process starts, and
processes hand PYTHONPATH down. The folder says whether mambakit's come first. A ``sitecustomize`` of the installation
is run after it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

_FOLDER = Path(__file__).parent


def environment(override: bool, inherited: Mapping[str, str]) -> dict[str, str]:
    """``inherited`` with the folder in front of PYTHONPATH, whose empty entries stay: they are the current folder."""
    folder = str(_FOLDER / ("override" if override else "missing"))
    before = inherited.get("PYTHONPATH")
    rest = [entry for entry in before.split(os.pathsep) if not _is_here(entry)] if before else []
    return {**inherited, "PYTHONPATH": os.pathsep.join([folder, *rest])}


def start(override: bool) -> None:
    """Called by ``sitecustomize``: install the finders, then run the installation's own ``sitecustomize``."""
    from mambakit.compat.finder import install

    install(override)
    elsewhere = [entry for entry in sys.path if not _is_here(entry)]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


def _is_here(entry: str) -> bool:
    return Path(entry).parent == _FOLDER
