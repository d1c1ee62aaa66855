"""StreamScorer: a token's surprise is that of the whole stream read at once, however streams were cut and mixed."""

from __future__ import annotations

import random

import pytest
import torch

import mambakit
from mambakit.decoding import chunks as chunk_table
from mambakit.decoding.chunks import ChunkSizes
from mambakit.errors import CheckpointError, LogitsError, UsageError
from mambakit.generation import stream_scorer as module
from mambakit.generation.quantile import RunningQuantile
from mambakit.generation.score import score_text
from mambakit.generation.stream_scorer import StreamScorer
from tests.models.tiny import TEXT, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
# Sums of float32 in another order; the surprises are of order 5.
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path)
    return path


@pytest.fixture(scope="module")
def both(folder):
    model = mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return model, mambakit.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def whole(model, ids: torch.Tensor, first: int) -> torch.Tensor:
    """The surprise of each token by one forward over all of them."""
    inputs = torch.cat([torch.tensor([first]), ids[:-1]])[None]
    return -model(inputs).logits[0].log_softmax(-1).gather(1, ids[:, None])[:, 0]


def cut(ids: torch.Tensor, draw: random.Random, longest: int) -> list[torch.Tensor]:
    parts = []
    while len(ids):
        size = draw.randint(0, longest)
        parts.append(ids[:size])
        ids = ids[size:]
    return parts


@pytest.mark.parametrize("seed", range(4))
def test_any_chunking_and_order_is_the_whole(both, seed, monkeypatch, tmp_path):
    model, tokenizer = both
    draw = random.Random(seed)
    torch.manual_seed(seed)
    # Small forwards, so that groups are cut by tokens, by rows, and inside a chunk.
    sizes = ChunkSizes(draw.choice([3, 512]), draw.choice([5, 64, 1024]), 512)
    monkeypatch.setattr(chunk_table, "CHUNK_SIZES", {"cpu": sizes, "cuda": sizes})
    if seed % 2:
        monkeypatch.setattr(module, "_COPIED_BYTES", 3 * model.backbone.new_cache(1).nbytes)
    streams = {f"s{i}": torch.randint(0, 300, (draw.choice([0, 1, 40, 130]),)) for i in range(23)}
    waiting = {name: cut(ids, draw, 30) for name, ids in streams.items()}
    scorer = StreamScorer(model, tokenizer)
    found = {name: [] for name in streams}
    number = 0
    while any(waiting.values()):
        some = [name for name in streams if waiting[name] and draw.random() < 0.5]
        draw.shuffle(some)
        for name, surprises in scorer.score_tokens({name: waiting[name].pop(0) for name in some}).items():
            found[name].append(surprises)
        number += 1
        if number % 4 == 0:  # a restart
            scorer.save(tmp_path / "streams.safetensors")
            scorer = StreamScorer.load(tmp_path / "streams.safetensors", model, tokenizer)
    for name, ids in streams.items():
        if len(ids):
            torch.testing.assert_close(torch.cat(found[name]), whole(model, ids, scorer.first_token), **CLOSE)
            assert scorer.tokens(name) == len(ids)


def test_lines(both):
    model, tokenizer = both
    lines = [line + "\n" for line in TEXT[:600].split(", ")]
    scorer = StreamScorer(model, tokenizer)
    first = scorer.score_lines({"a": lines[:3], "b": []})
    rest = scorer.score_lines({"b": lines[3:5], "a": lines[3:]})
    assert first["b"] == []
    assert len(rest["b"]) == 2
    scores = first["a"] + rest["a"]
    assert [score.text for score in scores] == lines
    text = score_text(model, tokenizer, "".join(lines), per_token=True)
    assert sum(score.nats for score in scores) == pytest.approx(text.nats, rel=1e-5)
    assert sum(score.tokens for score in scores) == text.tokens
    assert scores[1].peak == pytest.approx(float(scores[1].surprises.max()))
    assert scores[1].bits == pytest.approx(scores[1].nats / 0.6931472, rel=1e-6)
    assert scores[1].nats_per_token == pytest.approx(scores[1].nats / scores[1].tokens)


def test_a_forgotten_stream_leaves_nothing_behind(both):
    model, tokenizer = both
    ids = torch.randint(0, 300, (20,))
    scorer = StreamScorer(model, tokenizer)
    before = scorer.score_tokens({"a": ids, "b": ids})["a"]
    scorer.forget("a")
    assert "a" not in scorer
    assert list(scorer) == ["b"]
    again = scorer.score_tokens({"c": ids})["c"]
    torch.testing.assert_close(again, before, **CLOSE)
    with pytest.raises(ValueError, match="no stream 'a'"):
        scorer.forget("a")


def test_many_streams_grow_the_slots(both):
    model, _ = both
    scorer = StreamScorer(model, first_token=0)
    ids = torch.randint(0, 300, (2, 300, 3))
    scorer.score_tokens({str(i): row for i, row in enumerate(ids[0])})
    second = scorer.score_tokens({str(i): row for i, row in enumerate(ids[1])})
    for i in (0, 17, 299):
        expected = whole(model, torch.cat([ids[0, i], ids[1, i]]), 0)[3:]
        torch.testing.assert_close(second[str(i)], expected, **CLOSE)


def test_mistakes(both, tmp_path):
    model, tokenizer = both
    with pytest.raises(ValueError, match="first_token"):
        StreamScorer(model)
    with pytest.raises(ValueError, match="first_token has token 304"):
        StreamScorer(model, first_token=304)
    scorer = StreamScorer(model, first_token=1)
    with pytest.raises(ValueError, match="chunk of 'b' has token 999"):
        scorer.score_tokens({"a": [1, 2], "b": [999]})
    assert len(scorer) == 0  # nothing was read
    with pytest.raises(TypeError, match="name is 3"):
        scorer.score_tokens({3: [1]})
    with pytest.raises(ValueError, match="tokenizer"):
        scorer.score_lines({"a": ["x\n"]})
    model.backbone.new_cache(1).save(tmp_path / "state")
    with pytest.raises(CheckpointError, match="does not hold streams"):
        StreamScorer.load(tmp_path / "state", model, tokenizer)
    scorer.save(tmp_path / "none")
    assert len(StreamScorer.load(tmp_path / "none", model)) == 0
    torch.manual_seed(5)
    other = mambakit.MambaForCausalLM(model.config).eval()
    with pytest.raises(CheckpointError, match="other weights"):
        StreamScorer.load(tmp_path / "none", other)


def test_a_damaged_description_is_named(both, tmp_path):
    from safetensors.torch import load_file, save_file

    model, _ = both
    scorer = StreamScorer(model, first_token=1)
    scorer.score_tokens({"a": [1, 2], "b": [3]})
    path = tmp_path / "streams"
    scorer.save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for change in ({"names": '["a"]'}, {"tokens": "x"}, {"first_token": "9999"}):
        save_file(load_file(path), tmp_path / "damaged", {**metadata, **change})
        with pytest.raises(CheckpointError, match="description of the streams is damaged"):
            StreamScorer.load(tmp_path / "damaged", model)


def test_nan_is_no_surprise(both):
    model = mambakit.MambaForCausalLM(both[0].config).eval()
    with torch.no_grad():
        model.backbone.norm_f.weight.fill_(float("nan"))
    with pytest.raises(LogitsError):
        StreamScorer(model, first_token=1).score_tokens({"a": [1, 2]})


def test_the_running_quantile_is_numpys():
    import numpy as np

    values = np.random.default_rng(0).normal(size=500)
    running = RunningQuantile(0.9, window=100)
    for number, value in enumerate(values, 1):
        running.add(float(value))
        latest = values[max(0, number - 100) : number]
        if number < 10:
            assert running.value is None
        else:
            assert running.value == pytest.approx(np.quantile(latest, 0.9))
    again = RunningQuantile(0.9, window=100, values=running.values)
    assert again.value == running.value
    with pytest.raises(UsageError, match="between 0 and 1"):
        RunningQuantile(1.0)
    with pytest.raises(UsageError, match="needs 10000 values"):
        RunningQuantile(0.9999, window=50)


@pytest.mark.cuda
def test_on_a_gpu(both):
    model, tokenizer = both
    ids = torch.randint(0, 300, (200,))
    expected = whole(model, ids, tokenizer.eos_token_id)
    gpu = mambakit.MambaForCausalLM(model.config).eval()
    gpu.load_state_dict(model.state_dict())
    scorer = StreamScorer(gpu.cuda(), tokenizer)
    found = [scorer.score_tokens({"a": part, "b": part[:2]})["a"] for part in ids.split([7, 1, 100, 92])]
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=1e-3)  # other kernels, TensorFloat-32 off
