"""register(): transformers' own Auto classes and pipelines use mambakit's models."""

from __future__ import annotations

from mambakit._versions import check_models
from mambakit.models.families import CAUSAL_LM, CLASSIFIER, CONFIG, FAMILIES, MASKED_LM, MODEL, TOKEN_CLASSIFIER

# transformers' names.
_AUTO_CLASSES = {
    MODEL: "AutoModel",
    CAUSAL_LM: "AutoModelForCausalLM",
    CLASSIFIER: "AutoModelForSequenceClassification",
    MASKED_LM: "AutoModelForMaskedLM",
    TOKEN_CLASSIFIER: "AutoModelForTokenClassification",
}


def register() -> None:
    """Make `transformers.AutoConfig`, `AutoModel*` and `pipeline` use mambakit's classes for every family's model_type.

    It changes transformers' registries for the whole process. A second call changes nothing.
    """
    check_models()
    import transformers

    for model_type, family in FAMILIES.items():
        config_class = family.load(CONFIG)
        transformers.AutoConfig.register(model_type, config_class, exist_ok=True)
        for ending, theirs in _AUTO_CLASSES.items():
            if ending in family.endings:
                getattr(transformers, theirs).register(config_class, family.load(ending), exist_ok=True)
