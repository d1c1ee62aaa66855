"""Embeddings of texts: pooled as said, and of a batch what each text alone gives."""

from __future__ import annotations

import pytest
import torch

import mambakit
from tests.models.configurations import worst
from tests.models.tiny import save_tiny

TEXTS = ["The cat sat", "on the mat, and the dog slept by the fire.", "a", "naïve 日本語"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny(folder, hidden_size=32)
    return model, mambakit.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_batch_is_its_texts_alone(pooling, loaded):
    model, tokenizer = loaded
    vectors = mambakit.embed(model, tokenizer, TEXTS, pooling, normalize=False, batch_size=3)
    assert vectors.shape == (4, 32)
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            hidden = model.backbone(ids).last_hidden_state[0]
        expected = hidden[-1] if pooling == "last" else hidden.mean(0)
        assert worst(vector, expected) < 1e-5


def test_one_text_a_base_model_and_lengths_of_1(loaded):
    model, tokenizer = loaded
    one = mambakit.embed(model.backbone, tokenizer, TEXTS[0])
    assert one.shape == (1, 32)
    assert abs(one.norm().item() - 1) < 1e-6
    assert torch.equal(one, mambakit.embed(model, tokenizer, [TEXTS[0]]))
    assert mambakit.embed(model, tokenizer, []).shape == (0, 32)


@pytest.mark.parametrize("complement", [None, [*range(304)]])
def test_a_model_that_reads_both_ways(complement, loaded):
    _, tokenizer = loaded
    config = mambakit.BiMambaConfig(
        hidden_size=32, num_hidden_layers=1, vocab_size=304, tie_projections=True, complement=complement
    )
    model = mambakit.BiMambaModel(config).eval()
    vectors = mambakit.embed(model, tokenizer, TEXTS, normalize=False, batch_size=3)
    assert vectors.shape == (4, 64 if complement else 32)
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0]
        assert worst(vector, hidden.mean(0)) < 1e-5
    assert mambakit.embed(model, tokenizer, []).shape == (0, vectors.shape[1])
    with pytest.raises(ValueError, match='no token has read all: take "mean"'):
        mambakit.embed(model, tokenizer, TEXTS, "last")


def test_what_has_no_embedding(loaded):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="pooling is 'max'; choose one of last, mean"):
        mambakit.embed(model, tokenizer, "a", "max")
    with pytest.raises(ValueError, match="text 1 .* has no tokens"):
        mambakit.embed(model, tokenizer, ["a", ""])
    with pytest.raises(ValueError, match="batch_size is 0"):
        mambakit.embed(model, tokenizer, "a", batch_size=0)


def test_sentence_transformers(loaded, tmp_path):
    """Its own modules read our models once `register` has been called."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    model, tokenizer = loaded
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    mambakit.register()
    words = modules.Transformer(str(tmp_path))
    pooling = modules.Pooling(32, pooling_mode="mean")
    encoder = sentence_transformers.SentenceTransformer(modules=[words, pooling], device="cpu")
    assert (
        worst(torch.from_numpy(encoder.encode(TEXTS)), mambakit.embed(model, tokenizer, TEXTS, normalize=False)) < 1e-4
    )
