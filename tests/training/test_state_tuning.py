"""State tuning: the initial state learns, the weights keep every bit, and the file is a state like any other."""

from __future__ import annotations

import io
import json
import multiprocessing
import queue
from array import array
from itertools import pairwise

import pytest
import torch
from rich.console import Console

import mambakit
from mambakit import cli
from mambakit.generation.state import State
from mambakit.generation.token_scores import score_packed
from mambakit.training.config import TrainConfig
from mambakit.training.loop import RunInterrupted, train
from mambakit.training.model import make_model
from mambakit.training.optimizer import make_optimizer, parameter_groups
from mambakit.training.run import Run
from mambakit.training.state_tuning import InitialState, add_initial_state, freeze_weights, initial_state_of
from mambakit.training.step import Objective, TrainingStep
from tests.models.configurations import pair
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("<|endoftext|>\n".join(f"the dog {i} slept by the fire and dreamed of the cat." for i in range(90)))
    return file


def config(base, text, out, **fields) -> TrainConfig:
    return TrainConfig(**{
        "train_files": [str(text)], "validation_fraction": 0.2, "init_from": str(base), "tune": "state",
        "respect_documents": True, "out": str(out), "steps": 25, "batch_size": 4, "sequence_length": 64,
        "learning_rate": 0.1, "log_every": 5, "checkpoint_every": 10, **fields,
    })  # fmt: skip


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def run(base, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, train(config(base, text, out / "run"), quiet())


def weights(folder) -> dict[str, torch.Tensor]:
    return mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict()


def test_it_learns_and_writes_a_state(base, text, run):
    out, summary = run
    assert summary["heldout_bits_per_character"] < summary["heldout_bits_per_character_without_state"] - 0.1
    assert {"state.safetensors", "README.md", "summary.json"} <= {p.name for p in (out / "run").iterdir()}
    assert not list((out / "run").glob("model*.safetensors"))
    model = mambakit.AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    state = State.load(out / "run" / "state.safetensors", model)
    assert state.rows == 1
    assert state.pending.tolist() == [[0]]  # the end token that stands before documents
    assert state.cache.nbytes == 4 * summary["parameters"]
    assert (
        f"`{base}`" in (out / "run" / "README.md").read_text() or str(base) in (out / "run" / "README.md").read_text()
    )


def test_the_heldout_score_is_of_the_file(base, text, run):
    """What the summary says is what State.load and a forward give."""
    out, summary = run
    model = mambakit.AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    tokenizer = mambakit.AutoTokenizer.from_pretrained(base)
    state = State.load(out / "run" / "state.safetensors", model)
    document = "the dog 3 slept by the fire and dreamed of the cat."
    ids = torch.tensor(tokenizer(document).input_ids)
    with torch.no_grad():
        logits = model(torch.cat([state.pending[0], ids])[None], cache_params=state.cache.clone()).logits[0]
    expected = logits[:-1].log_softmax(-1).gather(1, ids[:, None])[:, 0]
    (scores,) = score_packed(model, [(state.pending[0], ids)], state.cache)
    torch.testing.assert_close(scores.log_probs, expected, rtol=1e-5, atol=1e-5)
    assert float(-expected.mean()) == pytest.approx(summary["heldout_loss"], abs=0.5)


def test_the_weights_keep_every_bit(base, text, tmp_path):
    before = weights(base)
    for path in (base, quantized(base, tmp_path)):
        model = make_model(config(path, text, tmp_path / "x"), vocabulary(), quiet())
        frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("initial_")}
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            f"initial_state.tensors.{key}" for key in ("conv_states", "ssm_states")
        ]
        step = TrainingStep(model, make_optimizer(model, 0.1, (0.9, 0.95), 0.1), 1.0, "float32", True)
        rows = torch.randint(1, 300, (2, 33))
        for _ in range(3):
            step.run(rows, torch.rand(2, 33) < 0.1)
        for name, p in model.named_parameters():
            assert name.startswith("initial_") or torch.equal(p, frozen[name]), name
        assert float(initial_state_of(model).tensors["ssm_states"].abs().max()) > 0
    after = weights(base)
    assert all(torch.equal(before[name], after[name]) for name in before)


def quantized(base, tmp_path):
    assert cli.main(["quantize", str(base), str(tmp_path / "int8"), "--to", "int8"]) == 0
    return tmp_path / "int8"


def vocabulary():
    class Tiny:
        size, end = 300, 0

    return Tiny()


def test_a_packed_checkpoint_takes_its_state(base, text, tmp_path):
    """The weights are unpacked to learn; the state is bound to the packed ones, which it is used with."""
    path = quantized(base, tmp_path)
    train(config(path, text, tmp_path / "run", steps=2), quiet())
    model = mambakit.AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    assert State.load(tmp_path / "run" / "state.safetensors", model).rows == 1


@pytest.mark.parametrize("respect", [True, False])
def test_the_loss_and_its_gradient_are_those_of_documents_from_the_state(respect):
    model = pair("plain")[0].double()
    add_initial_state(model)
    freeze_weights(model)
    initial = initial_state_of(model)
    for p in initial.parameters():
        torch.nn.init.normal_(p, std=0.3)
    step = TrainingStep(model, make_optimizer(model, 1e-3, (0.9, 0.95), 0.1), 1.0, "float32", respect)
    rows = torch.randint(1, model.config.vocab_size, (2, 12))
    begins = torch.zeros(2, 12, dtype=torch.bool)
    begins[0, [4, 9]] = begins[1, 0] = begins[1, 7] = True
    loss = step._share(rows, begins, step._count(rows, begins), None)
    loss.backward()
    found = [p.grad.clone() for p in initial.parameters()]
    for p in initial.parameters():
        p.grad = None
    total, count = 0, 0
    for row, begin in zip(rows, begins, strict=True):
        # A document's sequence begins with the end token before it.
        cuts = sorted({0, 11, *([i - 1 for i in range(1, 12) if begin[i]] if respect else [])})
        for a, b in pairwise(cuts):
            logits = model(row[None, a:b], cache_params=initial.cache(1)).logits[0]
            total = total + torch.nn.functional.cross_entropy(logits, row[a + 1 : b + 1], reduction="sum")
            count += b - a
    (total / count).backward()
    assert float(loss) == pytest.approx(float(total / count), rel=1e-6)
    for ours, p in zip(found, initial.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-7)
    assert count == 22


def test_the_state_is_not_decayed():
    model = pair("plain")[0]
    add_initial_state(model)
    freeze_weights(model)
    decayed, free = parameter_groups(model, 0.1)
    assert decayed["params"] == []
    assert len(free["params"]) == 2


def test_a_state_of_whole_numbers_cannot_be_learned():
    from mambakit.modules import StateSpec, StateTensor

    spec = StateSpec(((StateTensor("seen", (3,), torch.int64),),), torch.float32)
    with pytest.raises(ValueError, match="no gradient"):
        InitialState(spec, "")


def test_resumed_is_uninterrupted(base, text, tmp_path, monkeypatch):
    whole = train(config(base, text, tmp_path / "whole", steps=8, checkpoint_every=4), quiet())

    def interrupt(self, *_):
        if self.step == 5:
            raise KeyboardInterrupt

    fields = {"steps": 8, "checkpoint_every": 4, "log_every": 5}
    monkeypatch.setattr(Run, "_log", interrupt)
    with pytest.raises(RunInterrupted):
        train(config(base, text, tmp_path / "cut", **fields), quiet())
    monkeypatch.undo()
    resumed = train(config(base, text, tmp_path / "cut", resume=True, **fields), quiet())
    model = mambakit.AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    a, b = (State.load(tmp_path / name / "state.safetensors", model) for name in ("whole", "cut"))
    assert all(torch.equal(x, y) for x, y in zip(a.cache.tensors().values(), b.cache.tensors().values(), strict=True))
    assert whole["heldout_loss"] == resumed["heldout_loss"]


def test_the_command_line_writes_from_it(base, run, capsys):
    file = run[0] / "run" / "state.safetensors"
    options = ["--model", str(base), "--greedy", "--max-new-tokens", "12", "--json"]
    texts = []
    for arguments in (["the dog"], ["--load-state", str(file), "the dog"], ["--load-state", str(file)]):
        assert cli.main(["generate", *options, *arguments]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] != texts[1]
    model = mambakit.AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    tokenizer = mambakit.AutoTokenizer.from_pretrained(base)
    state = State.load(file, model)
    for text, prompt in ((texts[1], "the dog"), (texts[2], "")):
        ids = torch.cat([state.pending[0], torch.tensor(tokenizer(prompt).input_ids, dtype=torch.int64)])
        out = model.generate(ids[None], cache_params=state.cache.clone(), max_new_tokens=12, do_sample=False)
        assert text == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def test_the_server_writes_from_it(base, run):
    pytest.importorskip("starlette")
    from mambakit.serving.messages import Task, WorkerOptions
    from mambakit.serving.replicas.worker import _Worker

    file = run[0] / "run" / "state.safetensors"
    _, connection = multiprocessing.Pipe()
    worker = _Worker(WorkerOptions(str(base), slots=2, state=str(file)), connection, queue.SimpleQueue())
    ids = worker.tokenizer("the dog").input_ids
    sampling = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": None}
    worker._start(Task(1, array("q", ids).tobytes(), sampling, 8))
    worker._start(Task(2, array("q", ids).tobytes(), sampling, 8))
    requests = list(worker.running)
    while worker.running:
        worker._step()
    state = State.load(file, worker.model)
    given = torch.cat([state.pending[0], torch.tensor(ids)])
    out = worker.model.generate(given[None], cache_params=state.cache.clone(), max_new_tokens=8, do_sample=False)
    for request in requests:
        assert request.tokens == out[0, len(given) :].tolist()[: len(request.tokens)]
        assert len(request.tokens) >= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_from": ""}, "init_from is empty"),
        ({"lora_rank": 2}, "lora_rank"),
        ({"stateful": True}, "stateful"),
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"parallel": "fsdp"}, "parallel=ddp"),
        ({"tune": "weights"}, "choose one of all, state"),
    ],
)
def test_mistakes(base, text, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(base, text, tmp_path, **fields)


def test_the_objective_of_a_plain_model_has_no_state():
    assert Objective(pair("plain")[0]).initial is None
