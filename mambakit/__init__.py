"""mambakit: run, train and serve Mamba (selective state space) models.

The public names are resolved when they are first used: importing mambakit imports neither torch nor transformers.
`ops`, `modules`, `nn`, `compat` and what they export need torch alone; every other name needs transformers, which the
extra ``hf`` brings, and its first use says so where that is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mambakit._lazy import lazy_names
from mambakit._versions import check_ops
from mambakit.models.families import public_classes

__version__ = "0.2.0"

# Public name -> the module that defines it.
_HOMES = {
    "AutoConfig": "mambakit.models.auto",
    "AutoModel": "mambakit.models.auto",
    "AutoModelForCausalLM": "mambakit.models.auto",
    "AutoModelForMaskedLM": "mambakit.models.auto",
    "AutoModelForSequenceClassification": "mambakit.models.auto",
    "AutoModelForTokenClassification": "mambakit.models.auto",
    "AutoTokenizer": "mambakit.models.auto",
    "CheckpointError": "mambakit.errors",
    "MambaCache": "mambakit.modules.cache",
    "MambaMixer": "mambakit.modules.mixers.mamba",
    "embed": "mambakit.generation.embed",
    "nn": "mambakit.nn",
    "ops": "mambakit.ops",
    "pipeline": "mambakit.generation.pipeline",
    "provide": "mambakit.compat.provision",
    "register": "mambakit.models.registration",
    **public_classes(),
}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from mambakit import nn, ops
    from mambakit.compat.provision import provide
    from mambakit.errors import CheckpointError
    from mambakit.generation.embed import embed
    from mambakit.generation.pipeline import pipeline
    from mambakit.models.auto import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )
    from mambakit.models.bimamba import (
        BiMambaConfig,
        BiMambaForMaskedLM,
        BiMambaForSequenceClassification,
        BiMambaForTokenClassification,
        BiMambaModel,
    )
    from mambakit.models.falcon_mamba import (
        FalconMambaConfig,
        FalconMambaForCausalLM,
        FalconMambaForSequenceClassification,
        FalconMambaForTokenClassification,
        FalconMambaModel,
    )
    from mambakit.models.mamba import (
        MambaConfig,
        MambaForCausalLM,
        MambaForSequenceClassification,
        MambaForTokenClassification,
        MambaModel,
    )
    from mambakit.models.registration import register
    from mambakit.modules.cache import MambaCache
    from mambakit.modules.mixers.mamba import MambaMixer


check_ops()

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
