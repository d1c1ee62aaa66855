"""mambakit: run, train and serve Mamba (selective state space) models.

The public names are resolved when they are first used: importing mambakit imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mambakit._versions import check_versions

__version__ = "0.1.0"

_SUBPACKAGES = ("ops",)
# Public name -> the module that defines it.
_HOMES = {
    "AutoConfig": "mambakit.models.auto",
    "AutoModel": "mambakit.models.auto",
    "AutoModelForCausalLM": "mambakit.models.auto",
    "AutoModelForSequenceClassification": "mambakit.models.auto",
    "AutoTokenizer": "mambakit.models.auto",
    "CheckpointError": "mambakit.models.checkpoints.loading",
    "FalconMambaConfig": "mambakit.models.mamba.configuration",
    "FalconMambaForCausalLM": "mambakit.models.falcon_mamba.modeling",
    "FalconMambaForSequenceClassification": "mambakit.models.falcon_mamba.modeling",
    "FalconMambaModel": "mambakit.models.falcon_mamba.modeling",
    "MambaCache": "mambakit.modules.cache",
    "MambaConfig": "mambakit.models.mamba.configuration",
    "MambaForCausalLM": "mambakit.models.mamba.modeling",
    "MambaForSequenceClassification": "mambakit.models.mamba.classification",
    "MambaMixer": "mambakit.modules.mixers.mamba",
    "MambaModel": "mambakit.models.mamba.modeling",
    "pipeline": "mambakit.generation.pipeline",
    "register": "mambakit.models.registration",
}

__all__ = [*_HOMES, *_SUBPACKAGES, "__version__"]

if TYPE_CHECKING:
    from mambakit import ops
    from mambakit.generation.pipeline import pipeline
    from mambakit.models.auto import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from mambakit.models.checkpoints.loading import CheckpointError
    from mambakit.models.falcon_mamba.modeling import (
        FalconMambaForCausalLM,
        FalconMambaForSequenceClassification,
        FalconMambaModel,
    )
    from mambakit.models.mamba.classification import MambaForSequenceClassification
    from mambakit.models.mamba.configuration import FalconMambaConfig, MambaConfig
    from mambakit.models.mamba.modeling import MambaForCausalLM, MambaModel
    from mambakit.models.registration import register
    from mambakit.modules.cache import MambaCache
    from mambakit.modules.mixers.mamba import MambaMixer


check_versions()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in _SUBPACKAGES:
        return importlib.import_module(f"mambakit.{name}")
    raise AttributeError(f"module 'mambakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES) | set(_SUBPACKAGES))
