"""State: reading once and forking equals reading every time; files resume exactly and belong to one model."""

from __future__ import annotations

import pytest
import torch

import mambakit
from mambakit.generation.fingerprint import fingerprint
from mambakit.generation.state import State
from mambakit.generation.stream import Sampling, Stream
from tests.models.configurations import pair, tokens
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    model = mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    model.generation_config.eos_token_id = None
    return model, mambakit.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def ids(both):
    return both[1]("The cat sat on the mat, and the dog", return_tensors="pt").input_ids[0]


def generate(model, state, **options):
    return model.generate(**state.inputs(), max_new_tokens=12, **{"do_sample": False, **options})[:, 1:]


def test_n_forks_equal_n_separate_runs(both, ids):
    model, tokenizer = both
    reads = []
    hook = model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: reads.append(args[0].numel()), with_kwargs=True
    )
    state = State.read(model, ids)
    hook.remove()
    assert sum(reads) == len(ids) - 1
    forks = state.fork(4)
    for i in range(4):
        sampling = Sampling(temperature=1.3, seed=i)
        fork = Stream(model, tokenizer, **forks.select([i]).prompt(), sampling=sampling, max_new_tokens=15)
        alone = Stream(model, tokenizer, ids, sampling, 15)
        assert "".join(fork) == "".join(alone)
        assert fork.tokens == alone.tokens
    assert len({tuple(row) for row in generate(model, forks, do_sample=True, seed=0).tolist()}) > 1


def test_forks_go_their_own_ways_in_one_batch(both, ids):
    """Rows that continue differently are what separate runs give, tokens and states."""
    model, _ = both
    endings = [torch.tensor([t]) for t in (5, 17, 40)]
    batch = State.read(model, ids).fork(3).extend(model, endings)
    rows = generate(model, batch)
    for i, ending in enumerate(endings):
        whole = model.generate(torch.cat([ids, ending])[None], max_new_tokens=12, do_sample=False)
        assert rows[i].tolist() == whole[0, len(ids) + 1 :].tolist()
        separate = State.read(model, torch.cat([ids, ending]))
        assert torch.allclose(batch.cache.ssm_states[:, i], separate.cache.ssm_states[:, 0], rtol=1e-4, atol=1e-6)


def test_a_state_in_the_hand_does_not_change(both, ids):
    model, tokenizer = both
    state = State.read(model, ids)
    kept = state.snapshot()
    generate(model, state)
    list(Stream(model, tokenizer, **state.prompt(), max_new_tokens=3))
    state.extend(model, ids)
    assert torch.equal(state.cache.ssm_states, kept.cache.ssm_states)
    assert torch.equal(state.cache.conv_states, kept.cache.conv_states)
    assert torch.equal(generate(model, state), generate(model, kept))


@pytest.mark.parametrize("name", ["plain", "odd_everything", "gelu", "falcon"])
@pytest.mark.parametrize("chunk", [1, 5, 2048])
def test_ragged_prompts_are_read_packed(name, chunk):
    model = pair(name)[0]
    rows = [tokens(1, length)[0] for length in (9, 1, 2, 23)]
    done = []
    state = State.read(model, rows, chunk_size=chunk, progress=done.append)
    assert done[-1] == sum(len(row) - 1 for row in rows)
    for i, row in enumerate(rows):
        alone = State.read(model, row)
        assert torch.allclose(state.cache.ssm_states[:, i], alone.cache.ssm_states[:, 0], rtol=1e-4, atol=1e-6)
        assert torch.allclose(state.cache.conv_states[:, i], alone.cache.conv_states[:, 0], rtol=1e-4, atol=1e-6)
        assert state.pending[i].tolist() == row[-1:].tolist()
    stacked = State.stack([State.read(model, row) for row in rows])
    assert torch.equal(stacked.pending, state.pending)
    assert torch.allclose(stacked.cache.ssm_states, state.cache.ssm_states, rtol=1e-4, atol=1e-6)


def test_extending_equals_reading_the_whole(both, ids):
    model, _ = both
    for cut in (1, 4, len(ids) - 1):
        state = State.read(model, ids[:cut]).extend(model, ids[cut:], chunk_size=3)
        assert torch.equal(generate(model, state), generate(model, State.read(model, ids)))


def test_files(both, ids, tmp_path):
    model, _ = both
    state = State.read(model, ids).fork(2)
    state.save(tmp_path / "s", model)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    loaded = State.load(tmp_path / "s", model)
    assert torch.equal(loaded.cache.ssm_states, state.cache.ssm_states)
    assert loaded.cache.get_seq_length() == state.cache.get_seq_length()
    assert torch.equal(generate(model, loaded), generate(model, state))
    with pytest.raises(ValueError, match="not a saved mambakit state"):
        mambakit.MambaCache.load(tmp_path / "s", model.config)  # it would lack the unread token
    state.cache.save(tmp_path / "c")
    bare = State.load(tmp_path / "c", model)
    with pytest.raises(ValueError, match=r"extend\(\) it"):
        bare.inputs()
    assert torch.equal(bare.extend(model, state.pending).pending, state.pending)


def test_a_file_belongs_to_one_model(both, ids, tmp_path):
    model, _ = both
    State.read(model, ids).save(tmp_path / "s", model)
    save_tiny(tmp_path / "m")
    same = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="float32").eval()
    assert fingerprint(same) == fingerprint(model)
    State.load(tmp_path / "s", same)
    with torch.no_grad():
        same.backbone.layers[1].mixer.D[3] += 1e-6
    assert fingerprint(same) != fingerprint(model)
    with pytest.raises(ValueError, match="other weights"):
        State.load(tmp_path / "s", same)
    raw = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="damaged"):
        State.load(tmp_path / "s", model)


def test_a_fingerprint_is_of_values():
    model = pair("plain")[0].bfloat16()
    before = fingerprint(model)
    assert fingerprint(model.float()) == before, "widening changes no value"
    assert fingerprint(model.double()) == before
    with torch.no_grad():
        model.backbone.layers[0].mixer.D += 1e-12
    assert fingerprint(model) != before, "numbers that only float64 holds"
    before = fingerprint(model.float())
    model.config.layer_norm_epsilon = 1e-3
    assert fingerprint(model) != before, "another configuration computes something else with the same weights"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, i: State.read(m, i[:0]), "a token in each"),
        (lambda m, i: State.read(m, []), "at least one text"),
        (lambda m, i: State.read(m, i[None, None]), r"expected \(l,\) or \(b, l\)"),
        (lambda m, i: State.read(m, i, chunk_size=0), "chunk_size is 0"),
        (lambda m, i: State.read(m, i).fork(0), "fork into 0"),
        (lambda m, i: State.read(m, i).fork(1.5), "fork into 1.5"),
        (lambda m, i: State.read(m, i).fork("2"), "fork into '2'"),
        (lambda m, i: State.read(m, i).save("no folder/state", m), "there is no folder"),
        (lambda m, i: State.read(m, i).save(".", m), "is a folder"),
        (lambda m, i: State.read(m, i).fork(2).prompt(), "holds 2"),
        (lambda m, i: State.read(m, i).extend(m, [i, i]), "of 2 texts"),
        (lambda m, i: State.stack([]), "no states"),
        (lambda m, i: State(m.backbone.new_cache(2), i[None]), r"must be \(2, 1\)"),
    ],
)
def test_bad_values(both, ids, make, message):
    with pytest.raises(ValueError, match=message):
        make(both[0], ids)
