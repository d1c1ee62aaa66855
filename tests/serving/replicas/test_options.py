"""What a task asks besides its sampling: log-probabilities, scores of the prompt, grammars, ends; at one replica."""

from __future__ import annotations

import time
from array import array

import pytest
import torch

from mambakit.generation.logprobs import token_log_probs
from mambakit.serving.messages import Cancel, Task, TextOptions
from tests.serving.replicas.test_errors_of_one_text import SAMPLING, Replica

pytestmark = pytest.mark.filterwarnings("ignore")


def task(id: int, most: int = 6, stop: tuple[str, ...] = (), ids=(5, 6, 7), **options) -> Task:
    return Task(id, array("q", ids).tobytes(), SAMPLING, most, stop, options=TextOptions(**options))


@pytest.fixture(scope="module")
def replica(chat_model) -> Replica:
    return Replica(chat_model)


def result(replica: Replica, one: Task):
    pieces = replica.run(one)[one.id]
    return pieces, [scored for piece in pieces for scored in piece.log_probs]


def test_log_probabilities_of_prompt_and_text(replica):
    pieces, scored = result(replica, task(1, log_probs=2, prompt_log_probs=True))
    prompt = [one for piece in pieces for one in piece.prompt_log_probs]
    tokens = [one.token for one in prompt + scored]
    expected = token_log_probs(replica.worker.model, torch.tensor(tokens), top=2)
    assert tokens[:3] == [5, 6, 7]
    assert len(scored) == 6
    own = torch.tensor([one.log_prob for one in (prompt + scored)[1:]])
    torch.testing.assert_close(own, expected.log_probs[1:], atol=1e-4, rtol=1e-4)
    plain, nothing = result(replica, task(2))
    assert "".join(p.text for p in plain) == "".join(p.text for p in pieces)
    assert nothing == []


def test_a_prompt_alone(replica):
    (piece,), _ = result(replica, task(3, most=0))
    assert (piece.finish_reason, piece.text, piece.tokens) == ("length", "", 0)
    pieces, _ = result(replica, task(4, most=0, prompt_log_probs=True, log_probs=0))
    assert len(pieces[-1].prompt_log_probs) == 3
    assert pieces[-1].finish_reason == "length"


def wait_for_grammars(replica: Replica) -> None:
    end = time.monotonic() + 60
    while replica.worker.compiling and replica.worker.inbox.empty():
        assert time.monotonic() < end
        time.sleep(0.01)


def run_constrained(replica: Replica, *tasks: Task) -> dict[int, list]:
    for one in tasks:
        replica.worker.inbox.put(one)
    replica.worker._read_inbox()
    wait_for_grammars(replica)
    while replica.worker.compiling:
        wait_for_grammars(replica)
        replica.worker._read_inbox()
    pieces: dict[int, list] = {one.id: [] for one in tasks}
    for _ in range(300):
        replica.worker._step()
        while not replica.worker.outbox._queue.empty():
            *_, events = replica.worker.outbox._queue.get()
            for piece in replica.worker.outbox._pieces(events):
                pieces[piece.id].append(piece)
        if all(found and found[-1].finish_reason for found in pieces.values()):
            return pieces
        replica.worker._read_inbox()
    raise AssertionError(pieces)


def test_grammars(replica):
    tasks = [
        task(10, 20, constraint=("regex", "ab|cd")),
        task(11, 20, constraint=("regex", "(")),
        task(12, 40, constraint=("json_schema", '{"enum": [[1]]}'), log_probs=0, prompt_log_probs=True),
        task(13, 20, constraint=("regex", "ab|cd")),
    ]
    pieces = run_constrained(replica, *tasks)
    texts = {id: "".join(piece.text for piece in found) for id, found in pieces.items()}
    assert texts[10] in ("ab", "cd")
    assert texts[13] == texts[10]
    assert pieces[11][-1].status == 400
    assert "unclosed group" in pieces[11][-1].error
    assert texts[12] == "[1]"
    assert len([one for piece in pieces[12] for one in piece.prompt_log_probs]) == 3
    assert pieces[12][-1].finish_reason == "stop"


def test_a_constraint_that_becomes_too_complex_is_the_clients_fault(replica):
    """It compiles. The message does not quote the text so far, which would be in the log with it."""
    bad, good = ("regex", "(?:(?:[a-z]{0,500}){0,500}){0,500}"), ("regex", "ab|cd")
    pieces = run_constrained(replica, task(14, 50, constraint=bad), task(15, 20, constraint=good))
    last = pieces[14][-1]
    assert (last.finish_reason, last.status) == ("error", 400)
    assert last.error.startswith("the constraint became too complex to follow")
    assert last.error.endswith("fewer alternatives")
    assert "Tokens:" not in last.error
    assert pieces[15][-1].finish_reason == "stop"


def test_a_text_that_is_cancelled_before_its_grammar_is_compiled(replica):
    replica.worker.inbox.put(task(20, 20, constraint=("regex", "[a-z]{5}x")))
    replica.worker._read_inbox()
    replica.worker._cancel(20)
    wait_for_grammars(replica)
    replica.worker._read_inbox()
    *_, events = replica.worker.outbox._queue.get(timeout=5)
    while not replica.worker.outbox._queue.empty():
        *_, more = replica.worker.outbox._queue.get()
        events = events + more
    (piece,) = replica.worker.outbox._pieces(events)
    assert (piece.id, piece.finish_reason) == (20, "cancelled")
    assert not replica.worker.running
    assert not replica.worker.compiling


@pytest.mark.parametrize("id", ["30", "3000"])
def test_a_prompt_that_is_cancelled_while_it_is_scored(replica, id):
    """Ids are numbers that came through a pipe: equal ones, and not the same object."""
    replica.worker.inbox.put(task(int(id), 5, ids=[5] * 3000, prompt_log_probs=True, log_probs=0))
    replica.worker._read_inbox()
    assert int(id) in replica.worker.scored
    replica.worker.inbox.put(Cancel(int(id)))
    replica.worker._read_inbox()
    assert not replica.worker.scored
    assert not len(replica.worker.scorer)
    *_, events = replica.worker.outbox._queue.get(timeout=5)
    assert [piece.finish_reason for piece in replica.worker.outbox._pieces(events)] == ["cancelled"]


def test_ends(replica):
    forced = {**SAMPLING, "logit_bias": {0: 1000.0}}
    base = task(40, 6)

    def tokens(id: int, **options) -> tuple[int, str]:
        one = Task(id, base.prompt_ids, forced, 6, (), options=TextOptions(**options))
        pieces = replica.run(one)[id]
        return sum(piece.tokens for piece in pieces), pieces[-1].finish_reason

    assert tokens(41) == (0, "stop")
    assert tokens(42, min_new_tokens=4) == (4, "stop")
    assert tokens(43, ignore_ends=True) == (6, "length")
