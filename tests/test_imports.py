"""Imports point one way: commands -> serving, training -> evaluation -> generation -> models -> decoding -> modules ->
ops -> torch; and compat -> modules, ops."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mambakit"
# From the bottom up: a layer may import itself and the layers before it.
LAYERS = [
    "errors",
    "_versions",
    "_lazy",
    "quoting",
    "threads",
    "output",
    "opening",
    "reading",
    "writing",
    "toml_files",
    "number",
    "ops",
    "modules",
    "compat",
    "nn",
    "decoding",
    "models",
    "assets",
    "generation",
    "inspection",
    "evaluation",
    "export",
    "training",
    "planning",
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
    "toml_files": {"tomli"},
    "threads": set(),
    "ops": {"torch", "triton", "numpy", "cuda"},
    "modules": {"torch", "safetensors", "transformers"},
    "compat": {"torch", "huggingface_hub"},
    "nn": {"torch"},
    "decoding": {"torch", "transformers", "numpy"},
}
# Layers that only these import.
IMPORTERS = {"compat": {"compat", "commands"}}


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
            assert layer in IMPORTERS.get(target, {layer}), f"{path.name}:{line}: {layer} imports {module}"
        elif layer in OUTSIDE and top not in sys.stdlib_module_names:
            assert top in OUTSIDE[layer], f"{path.name}:{line}: {layer} imports {module}"


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports below ``node`` that run: at the top and in functions, not those of type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        yield from statements(child)


def module_names() -> dict[str, Path]:
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}


def import_graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules among ``files`` that it imports, in functions too."""
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        targets = set()
        for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            else:
                named = [f"{node.module}.{alias.name}" for alias in node.names]
                targets |= {name if name in files else str(node.module) for name in named}
        graph[module] = (targets & files.keys()) - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module: A and B are in one where each reaches the other."""
    reached: dict[str, set[str]] = {}
    for module in graph:
        found: set[str] = set()
        pending = [module]
        while pending:
            new = graph[pending.pop()] - found
            found |= new
            pending += new
        reached[module] = found
    components = {frozenset({a, *(b for b in reached[a] if a in reached[b])}) for a in graph}
    return sorted(sorted(component) for component in components if len(component) > 1)


def test_circles_are_found():
    graph = {"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": set()}
    assert circles(graph) == [["a", "b", "c"]]


def test_no_imports_in_a_circle():
    """A function that imports a module which imports the function's own is a circle, too."""
    assert circles(import_graph(module_names())) == []


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


def test_compat_needs_no_transformers():
    """Every module of mamba_ssm, causal_conv1d and their extensions that mambakit gives."""
    loaded = loaded_by(
        "import importlib, mambakit\nmambakit.provide()\nfrom mambakit.compat.surface import MODULES\n"
        "for module, names in MODULES.items():\n for name in names: getattr(importlib.import_module(module), name)"
    )
    assert {"torch", "mamba_ssm", "causal_conv1d"} <= loaded
    assert not {"transformers", "huggingface_hub"} & loaded


def test_the_layers_need_torch_alone():
    loaded = loaded_by("import mambakit\nimport torch\nmambakit.nn.MambaStack(3, 8)(torch.zeros(2, 1, 3))")
    assert not {"transformers", "safetensors"} & loaded


def test_every_public_name_resolves():
    import mambakit

    for name in mambakit.__all__:
        assert getattr(mambakit, name) is not None
    with pytest.raises(AttributeError, match="MambaForQuestionAnswering"):
        _ = mambakit.MambaForQuestionAnswering
    assert {"MambaCache", "ops"} <= set(dir(mambakit))


def test_type_checkers_know_every_public_name():
    """The table of families makes names that a type checker must be told."""
    import mambakit

    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    told = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == set(mambakit.__all__) - {"__version__"}


@pytest.mark.parametrize(
    "package", ["mambakit.models.checkpoints", "mambakit.models.falcon_mamba", "mambakit.models.mamba"]
)
def test_a_folder_exports_its_public_names(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        _ = module.convrt


def test_the_table_alone_knows_each_checkpoint_format():
    """Everything else asks the table, so that a new format is a line there."""
    folder = "mambakit.models.checkpoints"
    formats = {f"{folder}.{name}" for name in ("gguf.format", "original", "packed", "transformers")}
    graph = import_graph(module_names())
    assert formats <= graph.keys()
    assert {module for module, targets in graph.items() if targets & formats} == {f"{folder}.table"}
