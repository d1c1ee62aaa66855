"""Held-out scores: whole documents, packed or in chunks, against one forward pass for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mambakit
from mambakit.training.data import TokenStore
from mambakit.training.evaluate import sample_loss, score_documents
from mambakit.training.optimizer import make_optimizer
from mambakit.training.step import TrainingStep
from mambakit.training.tokenizer import make_vocabulary

pytestmark = pytest.mark.filterwarnings("ignore")


def setup():
    torch.manual_seed(0)
    config = mambakit.MambaConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, initializer_range=0.3)
    source = np.random.default_rng(0)
    documents = [np.append(source.integers(1, 6, n), 0).astype(np.uint8) for n in (3, 70, 11, 1, 25, 40, 2)]
    return mambakit.MambaForCausalLM(config).eval(), documents, TokenStore.from_arrays(documents)


@pytest.mark.parametrize("chunk_size", [1, 20, 45, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_documents_are_scored_whole(chunk_size, masked):
    model, documents, store = setup()
    vocabulary = make_vocabulary("nucleotides")
    nats, tokens = 0.0, 0
    for document in documents:
        body = torch.from_numpy(document[:-1].astype(np.int64))
        with torch.no_grad():
            scores = model(torch.cat([torch.tensor([0]), body[:-1]])[None]).logits[0].log_softmax(-1)
        picked = scores.gather(1, body[:, None])[:, 0]
        kept = body != vocabulary.unknown if masked else torch.ones_like(body, dtype=torch.bool)
        nats -= float(picked[kept].sum())
        tokens += int(kept.sum())
    score = score_documents(model, store, vocabulary, masked, chunk_size)
    assert score.nats == pytest.approx(nats, rel=1e-4)
    assert (score.tokens, score.characters, score.bytes) == (tokens, tokens, tokens)


def test_the_sampled_loss_is_that_of_its_rows():
    model, documents, store = setup()
    step = TrainingStep(model, make_optimizer(model, 1e-3, (0.9, 0.95), 0.1), 1.0, "float32", False)
    joined = torch.from_numpy(np.concatenate(documents).astype(np.int64))
    with torch.no_grad():
        expected = model(joined[None], labels=joined[None]).loss
    assert sample_loss(step, store, 10_000) == pytest.approx(float(expected), rel=1e-4)
    assert model.training
