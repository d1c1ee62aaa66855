"""The FalconMamba models (arXiv 2410.05355). Public names are imported when they are first used."""

from typing import TYPE_CHECKING

from mambakit._lazy import lazy_names
from mambakit._versions import check_models

if TYPE_CHECKING:
    from mambakit.models.falcon_mamba.configuration import FalconMambaConfig
    from mambakit.models.falcon_mamba.modeling import (
        FalconMambaForCausalLM,
        FalconMambaForSequenceClassification,
        FalconMambaForTokenClassification,
        FalconMambaModel,
    )

__all__ = [
    "FalconMambaConfig",
    "FalconMambaForCausalLM",
    "FalconMambaForSequenceClassification",
    "FalconMambaForTokenClassification",
    "FalconMambaModel",
]

check_models()
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "FalconMambaConfig": "mambakit.models.falcon_mamba.configuration",
        "FalconMambaForCausalLM": "mambakit.models.falcon_mamba.modeling",
        "FalconMambaForSequenceClassification": "mambakit.models.falcon_mamba.modeling",
        "FalconMambaForTokenClassification": "mambakit.models.falcon_mamba.modeling",
        "FalconMambaModel": "mambakit.models.falcon_mamba.modeling",
    },
)
