"""Scoring: the streamed likelihood is the likelihood of one forward, at constant memory."""

from __future__ import annotations

import math

import pytest
import torch

import mambakit
from mambakit.generation import score as module
from mambakit.generation.score import Score, score_text
from tests.models.tiny import TEXT, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    model = mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return model, mambakit.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_equals_one_forward(both, chunk):
    model, tokenizer = both
    text = TEXT[:300]
    ids = tokenizer(text, return_tensors="pt").input_ids
    inputs = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), ids], 1)
    with torch.no_grad():
        log_probs = model(inputs).logits.log_softmax(-1)[:, :-1]
    expected = log_probs.gather(2, ids[..., None]).double().sum().item()
    score = score_text(model, tokenizer, text, chunk_size=chunk, per_token=True)
    assert score.tokens == ids.shape[1] == len(score.log_probs)
    assert score.nats == pytest.approx(-expected, rel=1e-5)
    assert sum(score.log_probs) == pytest.approx(expected, rel=1e-5)
    assert (score.characters, score.bytes) == (len(text), len(text.encode()))


def test_a_stream_of_pieces_is_the_whole(both, monkeypatch):
    model, tokenizer = both
    text = (TEXT[:200] + "\n") * 6
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 300)
    done = []
    pieces = [text[i : i + 37] for i in range(0, len(text), 37)]
    streamed = score_text(model, tokenizer, iter(pieces), chunk_size=50, progress=done.append)
    whole = score_text(model, tokenizer, text, chunk_size=50)
    assert streamed.nats == pytest.approx(whole.nats, rel=1e-6)
    assert done[-1] == streamed.characters == len(text)


def test_averages():
    score = Score(nats=8 * math.log(2), tokens=4, characters=16, bytes=32) + Score(0.0, 0, 0, 0)
    assert score.bits_per_character == 0.5
    assert score.bits_per_byte == 0.25
    assert score.perplexity == pytest.approx(4.0)
    assert Score().nats_per_token == 0


def test_the_embedded_model_scores_its_cards_figure():
    """English prose near the card's 1.36 bits per character; shuffled letters far from it."""
    import random

    model = mambakit.AutoModelForCausalLM.from_pretrained(module_path(), dtype="float32").eval()
    tokenizer = mambakit.AutoTokenizer.from_pretrained(module_path())
    text = (
        "The old man took his hat from the chair and went slowly to the door. He stood there for a moment, as though "
        "he had forgotten something, and then he turned and looked at her. 'I shall not come again,' he said."
    )
    letters = list(text)
    random.Random(0).shuffle(letters)
    assert score_text(model, tokenizer, text).bits_per_character < 1.8
    assert score_text(model, tokenizer, "".join(letters)).bits_per_character > 3


def module_path():
    from mambakit.assets import default_model_path

    return default_model_path()


def test_bad_values(both):
    with pytest.raises(ValueError, match="chunk_size is 0"):
        score_text(*both, "text", chunk_size=0)
