"""Mamba in both directions: models that read a whole text at once, for masked tokens, labels of tokens and of texts.

Each layer has a mixer that reads forwards and one that reads backwards, and adds what they say (Caduceus,
arXiv 2403.03234). For DNA a model may be equivariant to the reverse complement. Public names are imported when they are
first used.
"""

from typing import TYPE_CHECKING

from mambakit._lazy import lazy_names

if TYPE_CHECKING:
    from mambakit.models.bimamba.configuration import BiMambaConfig
    from mambakit.models.bimamba.heads import (
        BiMambaForMaskedLM,
        BiMambaForSequenceClassification,
        BiMambaForTokenClassification,
    )
    from mambakit.models.bimamba.modeling import BiMambaModel

__all__ = [
    "BiMambaConfig",
    "BiMambaForMaskedLM",
    "BiMambaForSequenceClassification",
    "BiMambaForTokenClassification",
    "BiMambaModel",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BiMambaConfig": "mambakit.models.bimamba.configuration",
        "BiMambaForMaskedLM": "mambakit.models.bimamba.heads",
        "BiMambaForSequenceClassification": "mambakit.models.bimamba.heads",
        "BiMambaForTokenClassification": "mambakit.models.bimamba.heads",
        "BiMambaModel": "mambakit.models.bimamba.modeling",
    },
)
