"""The options of `mambakit generate` and `mambakit score` for states, forms, speculation and log-probabilities."""

from __future__ import annotations

import json
import re

import pytest
import torch

import mambakit
from mambakit import cli
from mambakit.generation.state import State
from mambakit.models.mamba.inference import InferenceBackbone
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, eos_token_id=303)  # no token of its tokenizer: texts run to their full length
    return str(folder)


@pytest.fixture
def run(model, capsys):
    """Run a command in this process on the small model; its JSON records, or what it printed."""

    def call(command, *arguments, text=False, folder=model):
        code = cli.main([command, *arguments, "--model", folder, *([] if text else ["--json"])])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out if text else [json.loads(line) for line in captured.out.splitlines()]

    return call


@pytest.fixture
def fails(model, capsys):
    def call(command, *arguments, folder=model):
        assert cli.main([command, *arguments, "--model", folder]) == 2
        message = capsys.readouterr().err
        assert len(message.strip().splitlines()) == 1, message
        return message

    return call


PROMPT = "The cat sat on the mat, and the dog"


def read_tokens(monkeypatch):
    """Counts of the tokens of a text that each forward of the backbone reads."""
    counts: list[int] = []
    forward = InferenceBackbone.forward

    def counted(self, input_ids=None, *args, **kwargs):
        counts.append(input_ids.shape[1])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(InferenceBackbone, "forward", counted)
    return counts


def test_return_sequences_fork_one_reading(run, monkeypatch):
    alone = [run("generate", PROMPT, "--seed", str(5 + i), "--max-new-tokens", "8")[0] for i in range(3)]
    counts = read_tokens(monkeypatch)
    forks = run("generate", PROMPT, "--seed", "5", "--max-new-tokens", "8", "--num-return-sequences", "3")
    assert [fork["tokens"] for fork in forks] == [one["tokens"] for one in alone]
    assert max(counts) == alone[0]["prompt_tokens"] - 1
    assert sum(count > 1 for count in counts) == 1, "the prompt is read once"


def test_a_repetition_penalty_counts_the_prompt(run, model):
    options = ("--greedy", "--repetition-penalty", "1.8", "--max-new-tokens", "12")
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    ids = mambakit.AutoTokenizer.from_pretrained(model)(PROMPT, return_tensors="pt").input_ids
    expected = loaded.generate(ids, do_sample=False, repetition_penalty=1.8, max_new_tokens=12)[0, ids.shape[1] :]
    for more in ((), ("--prompt-lookup",)):
        assert run("generate", PROMPT, *options, *more)[0]["tokens"] == [t for t in expected.tolist() if t != 303]


def test_a_repetition_penalty_counts_what_a_state_has_not_read(run, model, tmp_path):
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    ids = mambakit.AutoTokenizer.from_pretrained(model)(PROMPT, return_tensors="pt").input_ids
    options = ("--greedy", "--repetition-penalty", "1.8", "--max-new-tokens", "12", "--load-state", str(tmp_path / "s"))

    def text(whole):
        found = loaded.generate(whole, do_sample=False, repetition_penalty=1.8, max_new_tokens=12)
        return [token for token in found[0, whole.shape[1] :].tolist() if token != 303]

    changed = 0
    for first in sorted(set(text(ids))):
        begun = torch.tensor([first])
        State.read(loaded, begun).save(tmp_path / "s", loaded)  # nothing is read, one token is pending
        expected = text(torch.cat([begun[None], ids], 1))
        assert run("generate", PROMPT, *options)[0]["tokens"] == expected
        changed += first not in expected
    assert changed, "the penalty of the token that was pending changes nothing"
    sequences = run("generate", PROMPT, *options, "--num-return-sequences", "2")
    assert all(one["tokens"] == expected for one in sequences)


def test_a_state_resumes_where_the_text_was_cut_off(run, fails, tmp_path):
    state = str(tmp_path / "s")
    whole = run("generate", PROMPT, "--greedy", "--max-new-tokens", "12")[0]["tokens"]
    first = run("generate", PROMPT, "--greedy", "--max-new-tokens", "5", "--save-state", state)[0]["tokens"]
    again = str(tmp_path / "t")
    second = run("generate", "--greedy", "--max-new-tokens", "3", "--load-state", state, "--save-state", again)[0][
        "tokens"
    ]
    third = run("generate", "--greedy", "--max-new-tokens", "4", "--load-state", again)[0]["tokens"]
    assert first + second + third == whole
    forks = run(
        "generate", "--load-state", state, "--num-return-sequences", "2", "--max-new-tokens", "4", "--seed", "1"
    )
    assert forks[0]["tokens"] != forks[1]["tokens"]
    nothing = str(tmp_path / "u")
    run("generate", PROMPT, "--max-new-tokens", "0", "--save-state", nothing)
    assert run("generate", "--greedy", "--max-new-tokens", "12", "--load-state", nothing)[0]["tokens"] == whole
    assert "--echo gives the prompt back" in fails("generate", "--load-state", state, "--echo", "--json")
    assert "drop one" in fails("generate", "--load-state", state, "--prefix-cache", "x")


def test_a_text_that_ended_needs_something_to_go_on_with(run, fails, tmp_path):
    state = str(tmp_path / "s")
    free = run("generate", PROMPT, "--greedy", "--max-new-tokens", "12")[0]["text"]
    stop = free[5:8]
    run("generate", PROMPT, "--greedy", "--stop", stop, "--save-state", state)
    assert "extend() it" in fails("generate", "--load-state", state)
    assert run("generate", " by", "--load-state", state, "--max-new-tokens", "3")[0]["tokens"]


def test_the_prefix_cache_folder(run, tmp_path, monkeypatch):
    folder = str(tmp_path / "cache")
    options = ("--greedy", "--max-new-tokens", "6", "--prefix-cache", folder)
    plain = run("generate", PROMPT, *options[:3])[0]
    first = run("generate", PROMPT, *options)[0]
    counts = read_tokens(monkeypatch)
    second = run("generate", PROMPT, *options)[0]
    assert plain["tokens"] == first["tokens"] == second["tokens"]
    assert (first["cached_tokens"], second["cached_tokens"]) == (0, plain["prompt_tokens"] - 1)
    assert max(counts) == 1
    read = plain["prompt_tokens"] + 5  # all but the last token written
    assert list((tmp_path / "cache").glob(f"*/{read}-*.safetensors")), "the text that was written is kept, too"


def test_forms(run, fails, tmp_path):
    pytest.importorskip("llguidance")
    folder = str(tmp_path / "m")
    save_tiny(tmp_path / "m", eos_token_id=0)
    schema = tmp_path / "schema.json"
    wanted = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    schema.write_text(json.dumps(wanted), encoding="utf-8")

    def text(*form):
        record = run("generate", PROMPT, *form, "--seed", "1", "--max-new-tokens", "60", folder=folder)[0]
        assert record["finish_reason"] == "stop"
        return record["text"]

    assert re.fullmatch("(cat|dog){1,3}!", text("--regex", "(cat|dog){1,3}!"))
    assert re.fullmatch("(cat|dog){1,3}!", text("--regex", "(cat|dog){1,3}!", "--prompt-lookup"))
    assert re.fullmatch("(cat|dog){1,3}!", text("--regex", "(cat|dog){1,3}!", "--repetition-penalty", "1.2"))
    assert text("--grammar", 'start: "a" "b"? "c"') in ("ac", "abc")
    assert json.loads(text("--json-schema", str(schema)))["n"] in (1, 2)
    assert json.loads(text("--json-schema", schema.read_text()))["n"] in (1, 2)
    assert "give exactly one" in fails("generate", "x", "--regex", "a", "--grammar", "b")
    assert "unclosed character class" in fails("generate", "x", "--regex", "([", folder=folder)
    assert "end-of-text token" in fails("generate", "x", "--regex", "a")


def test_speculation(run, fails, model):
    plain = run("generate", PROMPT, "--greedy", "--max-new-tokens", "30")[0]
    for option in (("--prompt-lookup",), ("--draft-model", model)):
        guessed = run("generate", PROMPT, "--greedy", "--max-new-tokens", "30", "--draft-tokens", "5", *option)[0]
        assert guessed["tokens"] == plain["tokens"]
        assert 0 <= guessed["accepted_tokens"] <= guessed["guessed_tokens"]
    assert guessed["accepted_tokens"] == guessed["guessed_tokens"] > 20, "the model guesses itself"
    assert "give one" in fails("generate", "x", "--prompt-lookup", "--draft-model", model)


def test_log_probabilities(run, fails):
    options = ("--seed", "2", "--max-new-tokens", "6")
    record = run("generate", PROMPT, "--logprobs", "3", *options)[0]
    logprobs = record["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 6
    assert all(len(alternatives) == 3 for alternatives in logprobs["top_logprobs"])
    echoed = run("generate", PROMPT, "--logprobs", "3", "--echo", *options)[0]
    assert echoed["text"] == PROMPT + record["text"]
    assert echoed["logprobs"]["token_logprobs"][0] is None
    assert echoed["logprobs"]["token_logprobs"][-6:] == pytest.approx(logprobs["token_logprobs"], abs=1e-4)
    assert "add --json" in fails("generate", "x", "--echo")


def test_scoring_choices(run, model):
    from mambakit.generation.score import score_choices

    loaded = mambakit.AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    tokenizer = mambakit.AutoTokenizer.from_pretrained(model)
    choices = [" on the mat", " by", " and the dog"]
    expected = score_choices(loaded, tokenizer, "The cat sat", choices)
    records = run("score", "--prefix", "The cat sat", *(a for c in choices for a in ("--choice", c)))
    assert [r["choice"] for r in records] == choices
    assert [r["log_prob"] for r in records] == pytest.approx([s.log_prob for s in expected], rel=1e-5)
    assert [r["tokens"] for r in records] == [len(s.log_probs) for s in expected]
    assert {"greedy", "log_prob_per_token"} <= set(records[0])
    table = run("score", "--prefix", "The cat sat", "--choice", " on the mat", "--choice", " by", text=True)
    assert "on the mat" in table


def test_scoring_choices_of_a_file(run, tmp_path):
    path = tmp_path / "choices.txt"
    path.write_text(" on\n by\n\n", encoding="utf-8")
    assert [r["choice"] for r in run("score", "--prefix", "The cat", "--choices", str(path))] == [" on", " by"]


def test_echo_of_a_text(run, fails):
    (record,) = run("score", "--echo", PROMPT, "--top", "2")
    assert record["text"] == PROMPT
    assert record["logprobs"]["token_logprobs"][0] is None
    assert len(record["logprobs"]["top_logprobs"][1]) == 2
    assert "The" in run("score", "--echo", PROMPT, "--top", "2", text=True)
    assert "give text files" in fails("score")
    assert "--choice" in fails("score", "--prefix", "x")
    assert "one of" in fails("score", "--echo", "x", "--prefix", "y", "--choice", "z")


def test_states_of_another_model_are_refused(run, fails, tmp_path, model):
    other = tmp_path / "other"
    tiny = save_tiny(other, eos_token_id=303)
    with torch.no_grad():
        tiny.backbone.layers[0].mixer.D += 1
    tiny.save_pretrained(other)
    state = str(tmp_path / "s")
    run("generate", PROMPT, "--max-new-tokens", "2", "--save-state", state)
    assert cli.main(["generate", "--load-state", state, "--model", model, "--max-new-tokens", "1"]) == 0
    assert cli.main(["generate", "--load-state", state, "--model", str(other)]) == 2
