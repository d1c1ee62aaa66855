"""register(): transformers' own Auto classes and pipelines use mambakit's models."""

from __future__ import annotations

import transformers

from mambakit.models.families import CAUSAL_LM, CLASSIFIER, CONFIG, FAMILIES, MASKED_LM, MODEL, TOKEN_CLASSIFIER

_AUTO_CLASSES = {
    MODEL: transformers.AutoModel,
    CAUSAL_LM: transformers.AutoModelForCausalLM,
    CLASSIFIER: transformers.AutoModelForSequenceClassification,
    MASKED_LM: transformers.AutoModelForMaskedLM,
    TOKEN_CLASSIFIER: transformers.AutoModelForTokenClassification,
}


def register() -> None:
    """Make `transformers.AutoConfig`, `AutoModel*` and `pipeline` use mambakit's classes for every family's model_type.

    It changes transformers' registries for the whole process. A second call changes nothing.
    """
    for model_type, family in FAMILIES.items():
        config_class = family.load(CONFIG)
        transformers.AutoConfig.register(model_type, config_class, exist_ok=True)
        for ending, theirs in _AUTO_CLASSES.items():
            if ending in family.endings:
                theirs.register(config_class, family.load(ending), exist_ok=True)
