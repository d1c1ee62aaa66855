"""What one text raises ends that text alone, with the status that is due; the replica goes on."""

from __future__ import annotations

import multiprocessing
import queue
from array import array

import pytest
import torch

import mambakit
from mambakit.generation.engine import Engine, Request
from mambakit.generation.stream import Sampling
from mambakit.serving.messages import Task, WorkerOptions
from mambakit.serving.replicas.worker import _Worker
from tests.decoding.choose_one import raising

pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": None}


class Replica:
    """A replica's main thread and outbox, stepped by hand; ``pieces`` is what the server receives."""

    def __init__(self, model: str, **options):
        self.server, connection = multiprocessing.Pipe()
        self.worker = _Worker(WorkerOptions(model, slots=2, **options), connection, queue.SimpleQueue())

    def run(self, *tasks: Task) -> dict[int, list]:
        """The pieces of each text, until all have ended."""
        worker, pieces = self.worker, {task.id: [] for task in tasks}
        for task in tasks:
            worker.inbox.put(task)
        for _ in range(200):
            worker._read_inbox()
            while getattr(worker, "pending", None) and len(worker.running) < worker.engine.rows:
                worker._start(worker.pending.popleft())
            worker._step()
            while not worker.outbox._queue.empty():
                *_, events = worker.outbox._queue.get()
                for piece in worker.outbox._pieces(events):
                    pieces[piece.id].append(piece)
            if all(found and found[-1].finish_reason for found in pieces.values()):
                return pieces
        raise AssertionError(f"not ended: {pieces}")

    def text(self, task: Task) -> str:
        pieces = self.run(task)[task.id]
        assert pieces[-1].finish_reason == "length", pieces
        return "".join(piece.text for piece in pieces)


def task(id: int, ids: list[int] | None = None, stop: tuple[str, ...] = (), **sampling) -> Task:
    return Task(id, array("q", ids or [5, 6, 7]).tobytes(), {**SAMPLING, **sampling}, 6, stop)


@pytest.fixture(scope="module", params=[0, 64 << 20], ids=["plain", "prefix_cache"])
def replica(request, model) -> Replica:
    return Replica(model, prefix_cache_bytes=request.param)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"repetition_penalty": "2"}, "repetition_penalty is"), ({"top_k": 1.5}, "top_k is 1.5"),
        ({"temperature": float("nan")}, "temperature"), ({"seed": 1 << 64}, "seed is"),
        ({"ids": [5, 304]}, "has token 304"), ({"ids": [-1]}, "has token -1"),
    ],
)  # fmt: skip
def test_values_are_the_clients_fault(replica, bad, says):
    """Should one pass the checks of the API."""
    alone = replica.text(task(0))
    pieces = replica.run(task(1), task(2, **bad), task(3))
    assert (pieces[2][-1].finish_reason, pieces[2][-1].status) == ("error", 400)
    assert says in pieces[2][-1].error
    for id in (1, 3):
        assert "".join(piece.text for piece in pieces[id]) == alone


def test_a_tokenizer_that_raises(replica, monkeypatch):
    """Detokenising is each text's own."""
    alone, tokenizer = replica.text(task(0)), replica.worker.tokenizer
    decode = type(tokenizer).decode

    class Odd:
        def __init__(self, count: int):
            self.left = count

        def decode(self, *args, **options):
            self.left -= 1
            if self.left < 0:
                raise OverflowError("x" * 5000)
            return decode(tokenizer, *args, **options)

    monkeypatch.setattr(replica.worker, "tokenizer", Odd(3))
    found = replica.run(task(2))[2]
    monkeypatch.setattr(replica.worker, "tokenizer", tokenizer)
    assert (found[-1].finish_reason, found[-1].status) == ("error", 500)
    assert found[-1].error.startswith("OverflowError: xxx")
    assert len(found[-1].error) < 600
    assert replica.worker.inbox.qsize() == 1, "the engine is told"
    assert replica.text(task(4)) == alone


@pytest.fixture(scope="module")
def loaded(model):
    return mambakit.AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize(
    "error", [ValueError("no"), RuntimeError("y" * 5000), MemoryError(), KeyError("k"), AssertionError()]
)
@pytest.mark.parametrize("when", ["mask", "accept"])
def test_a_constraint_that_raises(loaded, at, error, when):
    """At the first token or later, as a constraint may that grows too complex."""

    def good() -> Request:
        return Request(torch.tensor([5, 6]), Sampling(0.7, seed=1), max_new_tokens=6)

    engine = Engine(loaded, 3)
    (alone,) = Engine(loaded, 3).write([good()])
    beside, bad, after = [
        good(),
        Request(torch.tensor([7]), raising(error, at, when, temperature=0), max_new_tokens=6, keep_state=True),
        good(),
    ]
    for request in (beside, bad, after):
        engine.submit(request)
    for _ in engine.run():
        pass
    assert (bad.finish_reason, len(bad.tokens), bad.final_state) == ("error", at, None)
    assert bad.error.startswith(type(error).__name__)
    assert bad.exception is error
    assert len(bad.error) < 600
    assert beside.tokens == after.tokens == alone.tokens
    assert engine.busy == 0
    with pytest.raises(RuntimeError, match=type(error).__name__):
        engine.write([Request(torch.tensor([7]), raising(error, at, when, temperature=0), max_new_tokens=6), good()])


def test_a_prompt_that_raises(loaded, monkeypatch):
    """Reading is each prompt's own: no memory for one, say."""
    forward = type(loaded.backbone).forward

    def odd(self, input_ids=None, *args, **options):
        if input_ids is not None and (input_ids == 9).any():
            raise torch.OutOfMemoryError("no memory")
        return forward(self, input_ids, *args, **options)

    monkeypatch.setattr(type(loaded.backbone), "forward", odd)
    good, bad = (Request(torch.tensor([5, last]), max_new_tokens=4) for last in (6, 9))
    engine = Engine(loaded, 2)
    for request in (bad, good):
        engine.submit(request)
    for _ in engine.run():
        pass
    assert (good.finish_reason, bad.finish_reason, bad.error) == ("length", "error", "OutOfMemoryError: no memory")


def test_what_no_request_survives_is_raised(loaded):
    """A device that cannot be used any more is the replica's end."""

    engine = Engine(loaded, 2)
    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        engine.write([Request(torch.tensor([5]), raising(torch.AcceleratorError("device-side assert"), 1, "mask"))])
