"""The loop of our own: transformers' tokens, random numbers and states, without a word to the host in between."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationMixin, LogitsProcessorList, generation

from mambakit.decoding import slots as rows
from mambakit.decoding.batch import write_tokens
from mambakit.decoding.loop import TokenLoop
from mambakit.decoding.processor_sampler import WITHOUT_WAITING, ProcessorSampler
from mambakit.decoding.scaling import WidePenalty, WideTemperature
from mambakit.models import generate, generate_tokens
from mambakit.ops.sampling import cpu_multinomial
from tests.decoding.eager_graph import decode_by
from tests.models.configurations import pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")

CHOICES = {
    "greedy": {"do_sample": False},
    "greedy_penalty": {"do_sample": False, "repetition_penalty": 1.8},
    "sample": {"do_sample": True, "top_k": 0},
    "temperature": {"do_sample": True, "temperature": 0.7},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.6},
    "min_p": {"do_sample": True, "min_p": 0.1},
    "typical": {"do_sample": True, "typical_p": 0.7},
    "epsilon": {"do_sample": True, "epsilon_cutoff": 0.01},
    "penalty": {"do_sample": True, "repetition_penalty": 1.5},
    "all": {"do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
}
# Tokens that end a text: some rows early and all before 40 tokens; some rows only; none.
ENDS = {"all": list(range(1, 10)), "some": [3, 7], "none": None}


@pytest.fixture
def model():
    return pair("untied")[0]  # with tied embeddings these small models write one token for ever


def both(model, monkeypatch, ids, **options):
    """(result, the generator's next number) of our loop and of transformers' loop."""
    results, calls = [], []
    write = generate_tokens.write_tokens
    monkeypatch.setattr(generate_tokens, "write_tokens", lambda *a: calls.append(1) or write(*a))
    for ours in (True, False):
        with monkeypatch.context() as patch:
            if not ours:
                patch.setattr(generate.GenerativeMambaModel, "_sample", GenerationMixin._sample)
            torch.manual_seed(11)
            cache = options.get("cache_params")
            given = {} if cache is None else {"cache_params": cache.clone()}
            results.append((model.generate(ids, **{**options, **given}), torch.rand(3), given.get("cache_params")))
        assert len(calls) == 1
    return results


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("choice", CHOICES)
def test_the_tokens_and_random_numbers_of_transformers(way, model, monkeypatch, choice, ends):
    ids = tokens(6, 5)
    options = {"max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": ENDS[ends], **CHOICES[choice]}
    (ours, after, _), (theirs, expected, _) = both(model, monkeypatch, ids, **options)
    assert torch.equal(ours, theirs)
    assert torch.equal(after, expected), "the generator goes on from the same state"
    if ends == "all" and CHOICES[choice]["do_sample"]:
        lengths = (ours[:, 5:] != 0).sum(1)
        assert len(lengths.unique()) > 2, "rows end at different times"
        assert choice != "sample" or lengths.max() < 40, "and all of them before the limit"


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("choice", ["greedy", "greedy_penalty", "all"])
@pytest.mark.parametrize("given", [False, True], ids=["returned", "given"])
def test_the_state_that_transformers_leaves(way, model, monkeypatch, choice, ends, given):
    """Rows that ended early have read padding, and none has read too much."""
    ids = tokens(4, 5)
    options = {"max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": ENDS[ends], **CHOICES[choice]}
    if given:
        options["cache_params"] = model(tokens(4, 9), use_cache=True).cache_params
    else:
        options["return_dict_in_generate"] = True
    (ours, _, our_cache), (theirs, _, their_cache) = both(model, monkeypatch, ids, **options)
    if given:
        assert torch.equal(ours, theirs)
    else:
        assert torch.equal(ours.sequences, theirs.sequences)
        our_cache, their_cache = ours.past_key_values, theirs.past_key_values
    assert worst(our_cache.ssm_states, their_cache.ssm_states) < 1e-5
    assert worst(our_cache.conv_states, their_cache.conv_states) < 1e-5
    assert our_cache.get_seq_length() == their_cache.get_seq_length()


def test_several_sequences_of_each_prompt(way, model, monkeypatch):
    options = {"num_return_sequences": 3, "do_sample": True, "top_k": 20, "repetition_penalty": 1.3}
    options |= {"max_new_tokens": 40, "eos_token_id": ENDS["all"], "pad_token_id": 0}
    (ours, after, _), (theirs, expected, _) = both(model, monkeypatch, tokens(2, 5), **options)
    assert ours.shape[0] == 6
    assert torch.equal(ours, theirs)
    assert torch.equal(after, expected)
    again = model.generate(tokens(1, 5), seed=3, **options)
    assert len({tuple(row.tolist()) for row in again}) > 1


@pytest.mark.parametrize("choice", ["greedy", "all"])
def test_rows_that_have_ended_cost_nothing_more(model, monkeypatch, choice):
    """Where a row's bits are its own and nobody sees the state: the same tokens from fewer and fewer rows."""
    decode_by("native", monkeypatch)
    sizes = []
    step = rows.SlotPool.step
    monkeypatch.setattr(rows.SlotPool, "step", lambda self, t: sizes.append(self.size) or step(self, t))
    ids = tokens(8, 5)
    ends = ENDS["all"]
    if choice == "greedy":  # some end at the third token
        ends = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)[:4, 7].tolist()
    options = {"max_new_tokens": 30, "eos_token_id": ends, "pad_token_id": 0, "seed": 5, **CHOICES[choice]}
    sizes.clear()
    kept = model.generate(ids, return_dict_in_generate=True, **options).sequences
    assert set(sizes) == {8}, "the state is asked for"
    steps = len(sizes)
    cache = model.backbone.new_cache(8)
    sizes.clear()
    assert torch.equal(model.generate(ids, cache_params=cache, **options), kept)
    assert set(sizes) == {8}, "the state is the caller's"
    assert cache.get_seq_length() == kept.shape[1] - 1
    for more in ({}, {"prefill_chunk_size": 2}):
        sizes.clear()
        assert torch.equal(model.generate(ids, **options, **more), kept)
        assert len(sizes) == steps
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] <= 4


def test_rows_go_on_side_by_side_where_their_bits_depend_on_it(model, monkeypatch):
    decode_by("forward", monkeypatch)
    sizes = []
    step = rows.SlotPool.step
    monkeypatch.setattr(rows.SlotPool, "step", lambda self, t: sizes.append(self.size) or step(self, t))
    model.generate(tokens(8, 5), max_new_tokens=30, eos_token_id=ENDS["all"], pad_token_id=0, do_sample=True, seed=5)
    assert set(sizes) == {8}


def test_a_text_within_the_choice_of_anothers_token(way, model):
    """Both have as many rows, and a graph keeps the states of one text."""
    ids, other = tokens(2, 5), tokens(2, 7)
    options = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    expected, within = model.generate(ids, **options), []

    def processor(text, scores):
        within.append(model.generate(other, **options))
        return scores

    result = model.generate(ids, logits_processor=LogitsProcessorList([processor]), **options)
    assert torch.equal(result, expected)
    alone = model.generate(other, **options)
    assert len(within) == 8
    assert all(torch.equal(text, alone) for text in within)


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_logits_that_are_no_numbers_are_refused(way, model, count, sample):
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = float("nan")
    for ends in (None, [3]):
        with pytest.raises(RuntimeError, match="no token can be chosen"):
            model.generate(tokens(2, 5), max_new_tokens=count, do_sample=sample, eos_token_id=ends, pad_token_id=0)


@pytest.mark.parametrize("ends", [None, [3]])
def test_a_state_that_turns_to_no_numbers_is_refused_at_the_end(way, model, ends):
    """The first token is well; the state is not from the second on."""
    ids = tokens(2, 5)
    chosen = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=ends, pad_token_id=0)[:, 5:]
    with torch.no_grad():
        model.backbone.embeddings.weight[chosen[0, 0]] = float("nan")
    assert not (ids == chosen[0, 0]).any()
    with pytest.raises(RuntimeError, match="no token can be chosen"):
        model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=0)


class Waits(TorchDispatchMode):
    """Counts what would wait for a device: values taken to the host, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal"):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


PROCESSORS = [
    generation.RepetitionPenaltyLogitsProcessor(1.5), generation.TemperatureLogitsWarper(0.7),
    generation.TopKLogitsWarper(5), generation.TopPLogitsWarper(0.9), generation.MinPLogitsWarper(0.1),
    generation.TypicalLogitsWarper(0.9), generation.EpsilonLogitsWarper(0.01), WideTemperature(1e-30),
    WidePenalty(1e30),
]  # fmt: skip


def test_processors_do_not_wait(monkeypatch):
    # As it is by default: torch's compiler turns these checks off for the whole process.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    assert {type(p) for p in PROCESSORS} == WITHOUT_WAITING
    text, logits = tokens(3, 7), torch.randn(3, 61)
    for processor in PROCESSORS:
        with Waits() as waits:
            processor(text, logits)
        assert not waits.count, processor
    with Waits() as waits:
        generation.EtaLogitsWarper(0.1)(text, logits)
    assert waits.count, "why it is not among them"


@pytest.mark.parametrize("ends", [None, [999]], ids=["no_ends", "ends"])
@pytest.mark.parametrize("processors", [[], PROCESSORS], ids=["plain", "processors"])
@pytest.mark.parametrize("sample", [False, True])
@torch.no_grad()
def test_a_look_every_sixteen_tokens(model, monkeypatch, processors, sample, ends):
    """And no waiting between two looks."""
    decode_by("graph", monkeypatch)
    monkeypatch.setattr("tests.decoding.eager_graph.EagerGraph.__call__", lambda self: self.logits)
    monkeypatch.setattr(cpu_multinomial, "serves", lambda probabilities: False)  # as on a GPU
    counts = []
    write = TokenLoop.write

    def watched(self, count, **options):
        with Waits() as waits:
            found = write(self, count, **options)
        assert not waits.count
        counts.append(count)
        return found

    monkeypatch.setattr(TokenLoop, "write", watched)
    ids = tokens(2, 5)
    cache = model(ids, use_cache=True).cache_params
    sampler, over = ProcessorSampler(processors, sample, ids), None if ends is None else torch.tensor(ends)
    write_tokens(model, cache, ids, torch.randn(2, 61), 50, sampler, cache_is_kept=True, ends=over)
    assert counts == ([49] if ends is None else [16, 16, 16, 1])


@pytest.mark.parametrize("b", [1, 4])
@torch.no_grad()
def test_what_was_read_too_much_is_taken_back_only_where_it_shows(model, monkeypatch, b):
    decode_by("graph", monkeypatch)
    back = []
    go_back = rows.SlotPool.go_back
    monkeypatch.setattr(rows.SlotPool, "go_back", lambda self, s: back.append(1) or go_back(self, s))
    ids = tokens(b, 5)
    free = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    options = {"max_new_tokens": 40, "eos_token_id": free[:, 9].tolist(), "pad_token_id": 0, "seed": 2}
    by_rows = []
    likeliest = rows.SlotPool.likeliest
    monkeypatch.setattr(rows.SlotPool, "likeliest", lambda self, t, n, c: by_rows.append(n) or likeliest(self, t, n, c))
    model.generate(ids, do_sample=False, **options)
    assert not back, "greedy, and nobody sees the state"
    assert by_rows == [16], "the graph chose for itself"
    model.generate(ids, do_sample=False, return_dict_in_generate=True, **options)
    assert back.pop()
    model.generate(ids, do_sample=True, **{**options, "eos_token_id": ENDS["all"]})
    assert back.pop(), "the generator's state shows"


def test_what_waits_or_is_not_known_goes_to_transformers(model, monkeypatch):
    class Own(generation.TopKLogitsWarper):
        pass

    taken = []
    write = generate_tokens.write_tokens
    monkeypatch.setattr(generate_tokens, "write_tokens", lambda *a: taken.append(1) or write(*a))
    options = {"max_new_tokens": 4, "do_sample": True, "pad_token_id": 0, "seed": 1}
    ids = tokens(2, 5)
    expected = model.generate(ids, top_k=3, **options)
    assert taken.pop()
    own = model.generate(ids, top_k=0, logits_processor=LogitsProcessorList([Own(3)]), **options)
    assert torch.equal(own, expected)
    model.generate(ids, eta_cutoff=0.1, **options)
    model.generate(ids, output_scores=True, return_dict_in_generate=True, **options)
    assert not taken


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["untied", "falcon_odd"])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("choice", CHOICES)
def test_on_a_gpu(name, monkeypatch, choice, ends):
    model = pair(name)[0].cuda()
    options = {"max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": ENDS[ends], **CHOICES[choice]}
    options["return_dict_in_generate"] = True
    found = []
    write = generate_tokens.write_tokens
    monkeypatch.setattr(generate_tokens, "write_tokens", lambda *a: found.append(1) or write(*a))
    results = []
    ids = tokens(3, 5).cuda()
    for ours in (True, False):
        with monkeypatch.context() as patch:
            if not ours:
                patch.setattr(generate.GenerativeMambaModel, "_sample", GenerationMixin._sample)
            torch.manual_seed(11)
            results.append((model.generate(ids, **options), torch.rand(3, device="cuda")))
    (ours, after), (theirs, expected) = results
    assert found == [1]
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(after, expected)
    assert worst(ours.past_key_values.ssm_states, theirs.past_key_values.ssm_states) < 1e-4
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
    bare = model.generate(ids, **{**options, "return_dict_in_generate": False, "seed": 2})
    again = model.generate(ids, **{**options, "seed": 2}).sequences
    assert torch.equal(bare, again), "also where the state is nobody's"


@pytest.mark.cuda
@pytest.mark.parametrize("choice", CHOICES)
def test_a_gpu_is_waited_for_every_sixteen_tokens(choice):
    model = pair("untied")[0].cuda()
    ids = tokens(2, 5).cuda()

    def waits(count: int) -> int:
        options = {"max_new_tokens": count, "eos_token_id": [999], "pad_token_id": 0, **CHOICES[choice]}
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                model.generate(ids, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in seen)

    waits(40)
    assert waits(17) > 0, "a look is counted"
    assert waits(49) - waits(17) <= 4, "two looks more, each at the ends and at whether something could be drawn"
