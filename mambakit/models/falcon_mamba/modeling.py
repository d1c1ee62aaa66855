"""FalconMamba: Mamba with a weight-less RMSNorm on dt, B and C (the mixer reads ``mixer_rms_eps``)."""

from __future__ import annotations

from mambakit.models.falcon_mamba.configuration import FalconMambaConfig
from mambakit.models.mamba.classification import MambaForSequenceClassification
from mambakit.models.mamba.modeling import MambaForCausalLM, MambaModel
from mambakit.models.mamba.token_classification import MambaForTokenClassification


class FalconMambaModel(MambaModel):
    config_class = FalconMambaConfig


class FalconMambaForCausalLM(MambaForCausalLM):
    config_class = FalconMambaConfig


class FalconMambaForSequenceClassification(MambaForSequenceClassification):
    config_class = FalconMambaConfig


class FalconMambaForTokenClassification(MambaForTokenClassification):
    config_class = FalconMambaConfig
