"""The Mamba models (Gu & Dao, arXiv 2312.00752). Public names are imported when they are first used."""

from typing import TYPE_CHECKING

from mambakit._lazy import lazy_names
from mambakit._versions import check_models

if TYPE_CHECKING:
    from mambakit.models.mamba.classification import MambaForSequenceClassification
    from mambakit.models.mamba.configuration import MambaConfig
    from mambakit.models.mamba.modeling import MambaForCausalLM, MambaModel
    from mambakit.models.mamba.token_classification import MambaForTokenClassification

__all__ = [
    "MambaConfig",
    "MambaForCausalLM",
    "MambaForSequenceClassification",
    "MambaForTokenClassification",
    "MambaModel",
]

check_models()
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "MambaConfig": "mambakit.models.mamba.configuration",
        "MambaForCausalLM": "mambakit.models.mamba.modeling",
        "MambaForSequenceClassification": "mambakit.models.mamba.classification",
        "MambaForTokenClassification": "mambakit.models.mamba.token_classification",
        "MambaModel": "mambakit.models.mamba.modeling",
    },
)
