"""The service as a client meets it: two replicas in processes of their own behind one address."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mambakit
from mambakit.generation.engine import Engine, Request
from mambakit.generation.stream import Sampling
from tests.models.tiny import save_tiny
from tests.serving.conftest import serving, wait_until

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = ["The cat", "The cat sat on the mat, and", "The dog — naïve, tired —", "日本語の", "by the fire. 🙂", ""]
LONG = 1_000_000


@pytest.fixture(scope="module")
def tokenizer(model):
    return mambakit.AutoTokenizer.from_pretrained(model)


def ended(server) -> list[float]:
    """Texts that ended by themselves, of each replica."""
    metrics = server.metrics()
    series = 'mambakit_requests_total{{outcome="{}",replica="{}"}}'
    return [sum(metrics.get(series.format(how, replica), 0) for how in ("stop", "length")) for replica in (0, 1)]


def texts(events) -> tuple[str, str]:
    """The text of a stream's only choice, and how it ended; the stream must be whole."""
    events = list(events)
    assert events[-1] == {}
    choices = [choice for event in events[:-1] for choice in event["choices"]]
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


def test_both_replicas_work_and_texts_are_the_engines(server, model, tokenizer):
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()

    def request(index: int, prompt: str) -> Request:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids or [tokenizer.bos_token_id]
        sampling = Sampling(0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=index)
        return Request(torch.tensor(ids), sampling, max_new_tokens=24)

    asked = [(index, PROMPTS[index % len(PROMPTS)]) for index in range(12)]
    alone = Engine(loaded, 1).write(request(*one) for one in asked)
    before = ended(server)

    def complete(one: tuple[int, str]) -> dict:
        return server.complete(
            prompt=one[1], seed=one[0], temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1,
            max_tokens=24,
        )  # fmt: skip

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(complete, asked))
    for answer, expected in zip(answers, alone, strict=True):
        (choice,) = answer["choices"]
        assert choice["text"] == tokenizer.decode(expected.tokens, skip_special_tokens=True)
        assert choice["finish_reason"] == expected.finish_reason
        assert answer["usage"]["completion_tokens"] == len(expected.tokens)
        assert answer["usage"]["prompt_tokens"] == len(expected.prompt_ids)
    metrics = server.metrics()
    counts = [now - was for now, was in zip(ended(server), before, strict=True)]
    assert sum(counts) == 12
    assert min(counts) >= 3, "both replicas work"
    assert metrics['mambakit_time_to_first_token_seconds_count{replica="1"}'] >= 3
    assert metrics['mambakit_time_per_token_seconds_count{replica="1"}'] >= 3


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_is_the_whole_text(server, prompt):
    body = {"prompt": prompt, "seed": 7, "temperature": 1.3, "max_tokens": 40}  # hot: bytes of half characters come
    whole = server.complete(**body)["choices"][0]
    text, reason = texts(server.stream(**body))
    assert (text, reason) == (whole["text"], whole["finish_reason"])


def test_characters_of_several_tokens_come_whole(server, tokenizer):
    found = 0
    for seed in range(8):
        body = {"prompt": "日本語の文字 🙂 ", "seed": seed, "max_tokens": 30, "temperature": 0.5}
        whole = server.complete(**body)["choices"][0]["text"]
        events = [e["choices"][0]["text"] for e in server.stream(**body) if e]
        assert "".join(events) == whole
        found += sum(ord(c) > 0x3000 for c in whole)
        # only bytes that are no character at all, or those at the very end, may show as a replacement
        assert sum(piece.count("�") for piece in events) == whole.count("�")
    assert found > 3


def test_stop_strings_end_the_text_and_never_show(server):
    body = {"prompt": "The cat sat on", "temperature": 0, "max_tokens": 60}
    whole = server.complete(**body)["choices"][0]["text"]
    for stop in (whole[12:15], whole[20:29], whole[5]):
        cut = whole[: whole.index(stop)]
        answer = server.complete(**body, stop=[stop, "never in it"])
        assert answer["choices"][0] == {"index": 0, "text": cut, "logprobs": None, "finish_reason": "stop"}
        assert answer["usage"]["completion_tokens"] < 60
        pieces = [e["choices"][0]["text"] for e in server.stream(**body, stop=stop) if e]
        assert "".join(pieces) == cut


def test_several_prompts_copies_echo_and_usage(server, tokenizer):
    ids = tokenizer("The cat", add_special_tokens=False).input_ids
    options = {"seed": 3, "max_tokens": 5, "echo": True}
    answer = server.complete(prompt=[ids, ids], n=2, **options)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    first, second, *others = [choice["text"] for choice in answer["choices"]]
    assert first.startswith("The cat")
    assert first != second
    assert others == [first, second]
    assert answer["usage"] == {
        "prompt_tokens": 2 * len(ids),
        "completion_tokens": 20,
        "total_tokens": 2 * len(ids) + 20,
    }
    assert answer["model"] == "tiny"
    assert server.complete(prompt="The cat", **options)["choices"][0]["text"] == first
    *events, usage, done = server.stream(prompt=ids, n=2, stream_options={"include_usage": True}, **options)
    assert done == {}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 10
    assert all(event["usage"] is None for event in events)
    for index, expected in enumerate((first, second)):
        assert "".join(e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == index) == expected


def test_a_client_that_goes_away_frees_its_row(server):
    stream = server.stream(prompt="The cat", max_tokens=LONG, temperature=0)
    next(stream)
    assert sum(replica["busy"] for replica in server.health()["replicas"]) == 1
    stream.close()
    wait_until(lambda: not any(r["busy"] for r in server.health()["replicas"]), "the row is free", 5)
    with pytest.raises(Exception, match="timed out"):
        server.client.post("/v1/completions", json={"prompt": "The", "max_tokens": LONG, "temperature": 0}, timeout=0.5)
    wait_until(lambda: not any(r["busy"] for r in server.health()["replicas"]), "the row is free", 5)
    cancelled = sum(count for name, count in server.metrics().items() if 'requests_total{outcome="cancelled"' in name)
    assert cancelled == 2


def test_a_request_of_many_endless_texts_makes_nobody_wait(server):
    """Four rows, sixty endless texts: others have theirs, and the tokens that they have alone."""
    small = {"prompt": "The cat", "max_tokens": 80, "seed": 5}
    alone = server.complete(**small)["choices"][0]
    stream = server.stream(prompt=["The", "A"], n=30, max_tokens=LONG, temperature=0)
    for _ in range(20):
        next(stream)
    with ThreadPoolExecutor(8) as pool:
        for answer in pool.map(lambda _: server.complete(**small), range(8)):
            assert answer["choices"][0] == alone
    refused = server.post(prompt=["a", "b"], n=65)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert "are 130 texts, but at most 128 can run and wait here" in refused.json()["error"]["message"]
    assert "--max-texts" in refused.json()["error"]["message"]
    long = server.post(prompt=[5] * 65537)
    assert long.status_code == 400
    assert "has 65,537 tokens; at most 65,536 are read here" in long.json()["error"]["message"]
    assert "--max-prompt-tokens" in long.json()["error"]["message"]
    next(stream)
    stream.close()
    wait_until(lambda: not any(r["busy"] for r in server.health()["replicas"]), "the rows are free", 20)


def test_a_text_without_numbers_is_an_error_of_its_own(tmp_path):
    broken = save_tiny(tmp_path / "model", eos_token_id=303, tie_word_embeddings=False)
    with torch.no_grad():
        broken.backbone.embeddings.weight[302] = float("nan")
    broken.save_pretrained(tmp_path / "model")
    options = ("--model", str(tmp_path / "model"), "--slots", "2")
    with serving(tmp_path / "log", *options) as server:
        server.ready()
        asked = {"prompt": "The cat", "temperature": 0, "max_tokens": 200}
        alone = server.complete(**asked)["choices"][0]["text"]
        with ThreadPoolExecutor() as pool:
            beside = pool.submit(server.complete, **asked)
            answer = server.post(prompt=[302], seed=1)
            assert beside.result()["choices"][0]["text"] == alone
        assert answer.status_code == 500
        assert "could not be written: the model's logits are NaN" in answer.json()["error"]["message"]
        assert server.health()["status"] == "ok"
        assert server.complete(**asked)["choices"][0]["text"] == alone


def test_refusals(server):
    response = server.post(prompt="x", suffix="y")
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "suffix"
    assert error["type"] == "invalid_request_error"
    json = {"Content-Type": "application/json"}
    assert server.client.post("/v1/completions", content=b"{", headers=json).status_code == 400
    assert server.client.post("/v1/completions", content=b"{").status_code == 400
    assert server.post(prompt="x", model="gpt").status_code == 404
    missing = server.client.post("/v1/edits", json={})
    assert missing.status_code == 404
    assert "GET /openapi.json lists" in missing.json()["error"]["message"]
    assert server.client.get("/v1/completions").status_code == 405
    (listed,) = server.client.get("/v1/models").json()["data"]
    assert (listed["id"], listed["object"]) == ("tiny", "model")


def test_a_killed_replica_fails_its_texts_and_comes_back(server):
    body = {"prompt": "The cat", "max_tokens": LONG, "temperature": 0}
    streams = [server.stream(**body) for _ in range(2)]
    for stream in streams:
        next(stream)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(server.post, **body) for _ in range(2)]
        wait_until(lambda: sum(r["busy"] for r in server.health()["replicas"]) == 4, "all rows are taken")
        victim, other = server.health()["replicas"]
        os.kill(victim["pid"], signal.SIGKILL)
        answer = wait_until(lambda: next((w.result() for w in waiting if w.done()), None), "an answer")
        assert answer.status_code == 503
        message = answer.json()["error"]["message"]
        assert "replica 0 (cpu) died while it wrote this text (killed by signal 9)" in message
        ends = [next((e for e in stream if "error" in e), None) for stream in streams[:1]]
        assert ends[0]["error"]["type"] == "server_error"
        assert ends[0]["error"]["message"] == message
        health = server.health()
        assert health["status"] == "degraded"
        assert health["replicas"][0]["state"] in ("dead", "loading")
        assert health["replicas"][0]["error"] == "killed by signal 9"
        assert health["replicas"][1] == other | {"busy": 2}, "the other goes on"
        assert next(streams[1])["choices"][0]["text"]
        assert server.client.get("/health").status_code == 200
        wait_until(lambda: server.health()["status"] == "ok", "the replica is back")
        assert server.health()["replicas"][0]["restarts"] == 1
        # the other replica's rows are full: this is the new process
        assert server.complete(prompt="The", max_tokens=3, temperature=0)["usage"]["completion_tokens"] == 3
        streams[1].close()
        os.kill(server.health()["replicas"][1]["pid"], signal.SIGKILL)  # ends the last one
        assert sorted(w.result().status_code for w in waiting) == [503, 503]
