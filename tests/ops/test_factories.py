"""No tensor is made by torch's default dtype or device, which a user may set to anything: every call of a factory names
both."""

from __future__ import annotations

import ast
from pathlib import Path

import mambakit

_ROOT = Path(mambakit.__file__).parent
# name -> whether a dtype has to be named, too: the result of the others has that of what a caller gave.
_FACTORIES = dict.fromkeys(
    ("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "tensor", "zeros"),
    True,
) | {"as_tensor": False, "randperm": True, "empty_strided": True, "scalar_tensor": True}  # fmt: skip


def offences(source: str) -> list[tuple[int, str]]:
    """(line, call) of every factory call without dtype= and device=, but for what becomes a module's parameter: those
    follow torch's defaults as `nn.Linear`'s do."""
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("nn.Parameter", "torch.nn.Parameter"):
                return
            name = called.removeprefix("torch.")
            keywords = {k.arg for k in node.keywords}
            needed = {"dtype", "device"} if _FACTORIES.get(name) else {"device"}
            if called != name and name in _FACTORIES and None not in keywords and not needed <= keywords:
                found.append((node.lineno, ast.unparse(node)))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def test_every_factory_call_names_its_dtype_and_device():
    found = [
        f"{path.relative_to(_ROOT.parent)}:{line}: {call}"
        for path in sorted(_ROOT.rglob("*.py")) for line, call in offences(path.read_text())
    ]  # fmt: skip
    assert not found, "\n".join(found)


def test_the_test_sees_what_it_is_for():
    assert len(offences("torch.empty(3)\ntorch.zeros(3, dtype=d)\ntorch.tensor([1], device=x.device)")) == 3
    assert not offences("torch.empty(3, dtype=d, device=x.device)\nnn.Parameter(torch.ones(3))\nx.new_zeros(3)")
