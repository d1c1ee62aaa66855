"""There is one token loop and one place that chooses tokens. The source is searched for a second one."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "mambakit"
TREES = {str(p.relative_to(PACKAGE)): ast.parse(p.read_text(encoding="utf-8")) for p in sorted(PACKAGE.rglob("*.py"))}
WRITING = ("decoding/", "generation/", "models/", "serving/", "commands/")  # where tokens are written


def calls(*names: str) -> set[str]:
    """Files that call a method or function of one of these names; kernels and what trains apart."""
    found = set()
    for file, tree in TREES.items():
        if not file.startswith(WRITING):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                if name in names:
                    found.add(file)
    return found


def pool_calls(*names: str) -> set[str]:
    """Files that call these methods of something named pool, or of a slot pool by another name."""
    found = set()
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
                owner = node.func.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                if name.strip("_") == "pool":
                    found.add(file)
    return found


def test_slots_are_stepped_by_the_loop_alone():
    """And by the step that transformers' own loop asks for, and for guesses by the draft model."""
    steppers = {"decoding/loop.py", "decoding/transformers_steps.py", "decoding/draft_slots.py"}
    assert pool_calls("step", "likeliest") == steppers
    assert pool_calls("verify", "commit") == {"decoding/loop.py"}


def test_pools_are_made_where_texts_begin():
    makes = calls("SlotPool")
    assert makes == {
        "decoding/batch.py", "decoding/drafted_batch.py", "decoding/transformers_steps.py", "generation/stream.py",
        "decoding/draft_slots.py", "generation/engine.py", "generation/speculative.py",
    }  # fmt: skip


def test_random_numbers_for_tokens_are_the_samplers():
    assert calls("exponential_") == {"decoding/processor_sampler.py"}
    assert calls("random_raw", "Philox") == {"decoding/sampling_params.py"}
    assert not calls("multinomial") - {"decoding/processor_sampler.py"}


def test_the_likeliest_token_is_a_samplers_or_a_decoders():
    choosing = {
        "decoding/acceptance.py",
        "decoding/processor_sampler.py",
        "decoding/slots.py",
        "decoding/graph_step.py",
    }
    choosing |= {"decoding/draft_slots.py"}  # a chooser of guesses
    choosing |= {"decoding/device_acceptance.py", "decoding/distributions.py"}  # of a greedy row
    # Whether a given text is the greedy one; which is a text's last token.
    others = {"generation/token_scores.py", "models/mamba/classification.py"}
    others |= {"models/checkpoints/gguf/blocks.py"}  # a block's largest weight
    assert calls("argmax") - others <= choosing


def test_nothing_hidden_connects_calls():
    """No ContextVar: what one function tells another it passes as an argument."""
    for file, tree in TREES.items():
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        imported = {
            a.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names
        }
        assert not {"ContextVar", "contextvars"} & (names | imported), file
