"""What a forward pass is given: tensors of the right shape and dtype, or an error that names what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mambakit
from tests.models.configurations import BASE

IDS = torch.tensor([[1, 2, 3]])
WRONG = {
    "one row": ({"input_ids": IDS[0]}, ValueError, r"shape \(3,\), expected \(b, l\); .* input_ids\[None\]"),
    "three axes": ({"input_ids": IDS[None]}, ValueError, r"input_ids has shape \(1, 1, 3\), expected \(b, l\)$"),
    "an array": ({"input_ids": IDS.numpy()}, TypeError, "input_ids is a ndarray; give a tensor of token ids"),
    "a list": ({"input_ids": [[1, 2]]}, TypeError, "input_ids is a list; give a tensor of token ids"),
    "numbers": ({"input_ids": IDS.float()}, TypeError, "dtype torch.float32; token ids are int64 or int32"),
    "flags": ({"input_ids": IDS.bool()}, TypeError, r"input_ids has dtype torch\.bool"),
    "nothing": ({}, ValueError, "give exactly one of input_ids and inputs_embeds"),
    "embeddings of ids": ({"inputs_embeds": IDS[None]}, TypeError, "dtype torch.int64; ids are input_ids"),
    "embeddings of one row": ({"inputs_embeds": torch.zeros(3, 8)}, ValueError, r"expected \(b, l, h\); .*\[None\]"),
    "an array of embeddings": ({"inputs_embeds": np.zeros((1, 3, 8))}, TypeError, "inputs_embeds is a ndarray"),
}  # fmt: skip
MODELS = {
    "backbone": (mambakit.MambaConfig, mambakit.MambaModel),
    "language model": (mambakit.MambaConfig, mambakit.MambaForCausalLM),
    "classifier": (mambakit.MambaConfig, mambakit.MambaForSequenceClassification),
    "token classifier": (mambakit.MambaConfig, mambakit.MambaForTokenClassification),
    "falcon": (mambakit.FalconMambaConfig, mambakit.FalconMambaForCausalLM),
    "both ways": (mambakit.BiMambaConfig, mambakit.BiMambaModel),
    "masked": (mambakit.BiMambaConfig, mambakit.BiMambaForMaskedLM),
    "classifier both ways": (mambakit.BiMambaConfig, mambakit.BiMambaForSequenceClassification),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    config, model = MODELS[request.param]
    return model(config(**BASE, pad_token_id=0)).eval()


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs(model, case):
    given, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        model(**given)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_of_both_dtypes(model, dtype):
    output = model(IDS.to(dtype))
    assert torch.equal(output[0], model(IDS)[0])


@pytest.mark.parametrize(
    "labels, error, message",
    [
        (IDS[0], ValueError, r"labels have shape \(3,\), expected \(1, 3\)"),
        (IDS[:, 1:], ValueError, r"labels have shape \(1, 2\), expected \(1, 3\)"),
        (IDS.expand(2, 3), ValueError, r"labels have shape \(2, 3\), expected \(1, 3\)"),
        (IDS.numpy(), TypeError, "labels are a ndarray; give a tensor"),
        ([[1, 2, 3]], TypeError, "labels are a list; give a tensor"),
    ],
)
@pytest.mark.parametrize("name", ["language model", "token classifier", "falcon", "masked"])
def test_wrong_labels(name, labels, error, message):
    config, model = MODELS[name]
    with pytest.raises(error, match=message):
        model(config(**BASE))(IDS, labels=labels)


def test_labels_of_fewer_logits():
    model = mambakit.MambaForCausalLM(mambakit.MambaConfig(**BASE))
    with pytest.raises(ValueError, match=r"expected \(1, 1\); leave logits_to_keep at 0 to train"):
        model(IDS, labels=IDS, logits_to_keep=1)
