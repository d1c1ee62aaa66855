"""Imports point one way: commands -> serving, training -> evaluation -> generation -> models -> decoding -> modules -> ops -> torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mambakit"
# From the bottom up: a layer may import itself and the layers before it.
LAYERS = [
    "_versions",
    "errors",
    "quoting",
    "threads",
    "output",
    "opening",
    "reading",
    "writing",
    "number",
    "ops",
    "modules",
    "decoding",
    "models",
    "assets",
    "generation",
    "evaluation",
    "training",
    "serving",
    "commands",
    "cli",
]
# What each of the lower layers may import from outside, besides the standard library.
OUTSIDE = {
    "errors": set(),
    "output": {"rich"},
    "reading": {"torch", "safetensors"},
    "opening": {"pyarrow"},
    "writing": set(),
    "threads": set(),
    "ops": {"torch", "triton", "numpy", "cuda"},
    "modules": {"torch", "safetensors", "transformers"},
    "decoding": {"torch", "transformers", "numpy"},
}


def imports(path: Path) -> list[tuple[str, int]]:
    """Every module a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.append((node.module or "", node.lineno))
    return found


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if layer_of(p) in LAYERS]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_direction(path):
    layer = layer_of(path)
    allowed = set(LAYERS[: LAYERS.index(layer) + 1])
    for module, line in imports(path):
        top, _, rest = module.partition(".")
        if top == "mambakit":
            target = rest.split(".")[0]
            assert not target or target in allowed, f"{path.name}:{line}: {layer} imports {module}"
        elif layer in OUTSIDE and top not in sys.stdlib_module_names:
            assert top in OUTSIDE[layer], f"{path.name}:{line}: {layer} imports {module}"


def test_every_layer_is_listed():
    names = {layer_of(p) for p in PACKAGE.rglob("*.py")}
    assert names - {"__init__", "__main__"} <= set(LAYERS)


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(','.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.strip().splitlines()[-1].split(","))


def test_importing_the_package_is_light():
    assert not {"torch", "transformers", "numpy"} & loaded_by("import mambakit")


def test_the_ops_need_torch_alone():
    loaded = loaded_by("import mambakit.ops")
    assert "torch" in loaded
    assert not {"transformers", "safetensors", "triton"} & loaded


def test_every_public_name_resolves():
    import mambakit

    for name in mambakit.__all__:
        assert getattr(mambakit, name) is not None
    with pytest.raises(AttributeError, match="MambaForQuestionAnswering"):
        _ = mambakit.MambaForQuestionAnswering
    assert {"MambaCache", "ops"} <= set(dir(mambakit))
