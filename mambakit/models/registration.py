"""register(): from here on, transformers' own Auto classes and pipelines use mambakit's Mamba."""

from __future__ import annotations

import transformers

from mambakit.models import auto
from mambakit.models.checkpoints.formats import CONFIGS


def register() -> None:
    """Make `transformers.AutoConfig`, `AutoModel*` and `pipeline` resolve "mamba" and "falcon_mamba" to these classes.

    It changes transformers' registries for the whole process; calling it again changes nothing more.
    """
    for model_type, config_class in CONFIGS.items():
        transformers.AutoConfig.register(model_type, config_class, exist_ok=True)
        for theirs, ours in (
            (transformers.AutoModel, auto.AutoModel),
            (transformers.AutoModelForCausalLM, auto.AutoModelForCausalLM),
            (transformers.AutoModelForSequenceClassification, auto.AutoModelForSequenceClassification),
        ):
            theirs.register(config_class, ours._classes[model_type], exist_ok=True)
