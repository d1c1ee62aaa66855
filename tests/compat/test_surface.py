"""The table of what is given: every home is there, and the guide names every module and every name of it."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

from mambakit.compat.surface import ABSENT, EXTENSIONS, MODULES, TRITON, is_package

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "dropin.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", list(MODULES))
def test_every_name_has_its_home(module):
    for name, home in MODULES[module].items():
        place, _, ours = home.partition(":")
        value = getattr(importlib.import_module(place), ours)
        assert callable(value), f"{module}.{name}"
        assert inspect.getdoc(value), f"{home} has no docstring"
    parents = [module.rsplit(".", i)[0] for i in range(1, module.count(".") + 1)]
    assert all(parent in MODULES and is_package(parent) for parent in parents)


def test_the_tables_fit_together():
    assert set(EXTENSIONS) | set(TRITON) <= MODULES.keys()
    assert not ABSENT.keys() & MODULES.keys()


def test_the_guide_lists_what_is_given():
    words = set(re.findall(r"[\w.]+", GUIDE))
    assert {module for module, names in MODULES.items() if names} <= words
    assert {name for names in MODULES.values() for name in names if not name.endswith("_ref")} - words <= REFERENCES


# What the guide means by "references", "its reference", and what stands in other modules than its own.
REFERENCES = {
    "CausalConv1dFn", "CausalLMOutput", "GenerateDecoderOnlyOutput", "LayerNormFn",
    "causal_conv1d_bwd_function", "causal_conv1d_fwd_function", "causal_conv1d_update_function",
    "modify_logit_for_repetition_penalty", "modify_logits_for_min_p_filtering", "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
}  # fmt: skip
