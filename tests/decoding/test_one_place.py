"""What is done in one place, counted in the sources: reading prompts, capturing CUDA graphs, choosing a decoder."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "mambakit"
FILES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


def calls(tree: ast.AST) -> list[str]:
    """Every call, as it is written: "model.backbone", "torch.cuda.graph"."""
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def files_that(found) -> set[str]:
    return {name for name, tree in FILES.items() if found(tree)}


def test_the_backbone_is_called_by_models_and_prefill_alone():
    callers = files_that(lambda tree: any(call == "backbone" or call.endswith(".backbone") for call in calls(tree)))
    callers = {name for name in callers if not name.startswith(("models/", "compat/"))}  # compat's models are its own
    # The training step's objective is a forward with a gradient, of no prompt; embeddings pool the hidden states of
    # whole texts; an export traces a forward.
    assert callers == {"decoding/prefill.py", "training/step.py", "generation/embed.py", "export/pt2.py"}


def test_graphs_are_captured_in_one_module():
    names = ("CUDAGraph", "cuda.graph", "make_graphed_callables", "graph_pool_handle")
    callers = files_that(lambda tree: any(call.endswith(names) for call in calls(tree)))
    assert callers == {"ops/_backends/captured_graph.py"}


def test_decoders_are_chosen_in_the_registry_alone():
    """Its entries have a ``why_not``; whoever else asked one, or made a kernel's step, would choose."""
    steps = {"DecodeStep", "VerifyStep", "PersistentStep", "FewRowsStep", "ManyRowsStep", "ManyRowsVerification"}
    steps |= {"DecodeParts"}
    makers = files_that(lambda tree: any(call.split(".")[-1] in steps for call in calls(tree)))
    makers = {name for name in makers if not name.startswith("ops/")}  # where kernels are ops of their own
    assert makers == {"decoding/native_step.py", "decoding/graph_step.py", "decoding/verify.py"}
    decoders = {"NativeDecoder", "GraphDecoder", "persistent_decoder", "few_rows_decoder", "many_rows_decoder"}
    names = {*decoders, "NativeVerifier", "PersistentVerifier", "CapturedVerifier", "LayersVerifier"}
    names |= {"ManyRowsVerifier"}

    def refers(tree: ast.AST) -> bool:
        found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        return bool(names & (found | {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}))

    assert files_that(refers) <= {
        "decoding/registry.py",
        "decoding/verify_layers.py",
        "decoding/verify_rows.py",
        *makers,
    }
    asking = files_that(lambda tree: any(call.split(".")[-1] == "why_not" for call in calls(tree)))
    # Of which each asks its own kernel's.
    kernels = {"decoding/graph_step.py", "decoding/verify.py", "decoding/native_prompts.py"}
    assert {name for name in asking if name.startswith(("decoding/", "models/", "generation/"))} <= {
        "decoding/registry.py",
        *kernels,
    }


def test_eligibility_is_checked_in_one_module():
    """Which classes a kernel knows is said once."""
    checks = files_that(
        lambda tree: any(
            isinstance(node, ast.Compare) and "MambaMixer" in ast.unparse(node) and "type(" in ast.unparse(node)
            for node in ast.walk(tree)
        )
    )
    assert {name for name in checks if not name.startswith("modules/mixers/")} == {"decoding/eligibility.py"}
