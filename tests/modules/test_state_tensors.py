"""Which files know Mamba's two state tensors: kernels, mixers, and a handful of others."""

from __future__ import annotations

import ast
from pathlib import Path

import mambakit

ROOT = Path(mambakit.__file__).parent.parent
NAMES = {"conv_states", "ssm_states"}
# Kernels and mixers: ours, those of other runtimes' graphs, and layers outside of any model.
KERNELS = ("mambakit/ops/", "mambakit/modules/mixers/", "mambakit/export/", "mambakit/nn/")
# Whoever hands the tensors to a kernel. All others use StateCache's methods, which serve any specification.
ALLOWED = {
    "mambakit/modules/cache.py",
    "mambakit/decoding/graph_step.py",
    "mambakit/decoding/native_step.py",
    "mambakit/decoding/verify.py",
    "benchmarks/cpu.py",
    "benchmarks/decode_step.py",
}


def touches(file: Path) -> bool:
    """Whether the file reads an attribute or a key of one of the names."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in NAMES:
            return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
            return True
    return False


def test_few_files_touch_the_state_tensors():
    files = [
        f for folder in ("mambakit", "benchmarks", "examples", "experiments") for f in (ROOT / folder).rglob("*.py")
    ]
    names = {str(f.relative_to(ROOT)) for f in files if touches(f)}
    others = {name for name in names if not name.startswith(KERNELS)}
    assert others <= ALLOWED, (
        "use StateCache's methods (load_, copy_, tensors, ...): the state may be another architecture's"
    )
    assert len(ALLOWED) <= 6


def test_the_search_finds_them(tmp_path):
    for text in ("a.conv_states[0]", "getattr(a, 'ssm_states')", "f({'conv_states': 1})"):
        (tmp_path / "file.py").write_text(text)
        assert touches(tmp_path / "file.py"), text
    (tmp_path / "file.py").write_text('"""conv_states and ssm_states in prose."""\nstates = a.tensors()')
    assert not touches(tmp_path / "file.py")
