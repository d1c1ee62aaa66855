"""The table of model families: one line for each. Auto classes, registration and public names are made from it.

A family is a folder ``mambakit/models/<model_type>/`` whose ``__init__`` names its classes as transformers does:
``<prefix>Config``, ``<prefix>Model``, ``<prefix>ForCausalLM``, ``<prefix>ForSequenceClassification``,
``<prefix>ForTokenClassification``.
This module imports nothing heavy: `import mambakit` reads it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONFIG, MODEL, CAUSAL_LM = "Config", "Model", "ForCausalLM"
CLASSIFIER, TOKEN_CLASSIFIER, MASKED_LM = "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: of its config.json, and the name of its folder.
        prefix: of its classes.
        endings: of the classes that it has.
    """

    model_type: str
    prefix: str
    endings: tuple[str, ...] = (CONFIG, MODEL, CAUSAL_LM, CLASSIFIER, TOKEN_CLASSIFIER)

    @property
    def package(self) -> str:
        return f"mambakit.models.{self.model_type}"

    def load(self, ending: str) -> Any:
        """The class of this ending.

        Raises:
            ValueError: the family has none.
        """
        if ending not in self.endings:
            raise ValueError(f"{self.model_type} has no {self.prefix}{ending}; it has {', '.join(self.class_names())}")
        return getattr(importlib.import_module(self.package), self.prefix + ending)

    def class_names(self) -> list[str]:
        return [self.prefix + ending for ending in self.endings]


FAMILIES = {
    family.model_type: family
    for family in (
        Family("mamba", "Mamba"),
        Family("falcon_mamba", "FalconMamba"),
        Family("bimamba", "BiMamba", (CONFIG, MODEL, MASKED_LM, CLASSIFIER, TOKEN_CLASSIFIER)),
    )
}


def classifier_of(architectures: Sequence[str] | None) -> str | None:
    """The class of a checkpoint whose head gives classes, by the ``architectures`` of its config.json; else None."""
    names = list(architectures or ())
    if any(name.endswith(CAUSAL_LM) for name in names):
        return None
    return next((name for name in names if name.endswith((CLASSIFIER, TOKEN_CLASSIFIER))), None)


def public_classes() -> dict[str, str]:
    """Class name -> the package that exports it, for every family."""
    return {name: family.package for family in FAMILIES.values() for name in family.class_names()}
