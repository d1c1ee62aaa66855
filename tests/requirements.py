"""What a test file needs to be installed, read from its imports."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of mambakit, what torch alone suffices for.
_BARE = (
    "ops",
    "modules",
    "compat",
    "nn",
    "errors",
    "quoting",
    "provide",
    "MambaCache",
    "MambaMixer",
    "CheckpointError",
)


@functools.cache
def needs_transformers(path: Path) -> bool:
    """Whether the file imports transformers at its top, or a module of mambakit or of the tests that does."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return any(map(_needed_by, names))


def _needed_by(name: str) -> bool:
    """``name``: package.module.attribute, as far as an import statement has it."""
    package, _, rest = name.partition(".")
    if package == "mambakit":
        first = rest.partition(".")[0]
        return bool(first) and not first.startswith("_") and first not in _BARE
    if package == "tests":
        file = ROOT / f"{name.replace('.', '/')}.py"
        parent = ROOT / f"{name.rpartition('.')[0].replace('.', '/')}.py"
        return any(needs_transformers(each) for each in (file, parent) if each.is_file())
    return package in ("transformers", "tokenizers", "peft", "accelerate")
