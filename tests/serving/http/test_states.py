"""States over HTTP: texts go on from them, on any replica and after the server was killed; forks, branches, files."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mambakit import AutoModelForCausalLM
from mambakit.generation.state import State
from tests.serving.conftest import Server, serving

PROMPT = [5, 17, 99, 3, 42, 8, 250]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("states")


def start(model: str, folder: Path, log: Path, *options: str) -> Any:
    named = ("--model", model, "--served-model-name", "tiny", "--slots", "4")
    return serving(log, *named, "--states", str(folder), *options)


@pytest.fixture(scope="module")
def states(model, folder, tmp_path_factory) -> Iterator[Server]:
    with start(model, folder, tmp_path_factory.mktemp("serve") / "log", "--replicas", "2", "--prefix-cache") as server:
        yield server.ready()


def ask(server: Server, method: str, path: str, status: int = 200, **options: Any) -> Any:
    response = server.client.request(method, f"/v1/states{path}", **options)
    assert response.status_code == status, response.text
    return response.json()


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["text"]


def kept(answer: dict[str, Any]) -> dict[str, Any]:
    return answer["choices"][0]["state"]


def test_a_text_goes_on_from_a_state(states):
    whole = states.complete(prompt=PROMPT, max_tokens=30, temperature=0)
    state = ask(states, "POST", "", json={"prompt": PROMPT, "metadata": {"a": "b"}})
    assert (state["object"], state["tokens"], state["origin"], state["metadata"]) == ("state", 7, "prompt", {"a": "b"})
    first = states.complete(prompt="", state=state["id"], max_tokens=12, temperature=0, keep_state=True)
    second = states.complete(prompt="", state=kept(first)["id"], max_tokens=18, temperature=0)
    assert text_of(first) + text_of(second) == text_of(whole)
    assert first["usage"]["prompt_tokens"] == 0
    assert (kept(first)["tokens"], kept(first)["parent"], kept(first)["origin"]) == (19, state["id"], "completion")
    streamed = list(states.stream(prompt="", state=state["id"], max_tokens=12, temperature=0, keep_state=True))
    last = streamed[-2]["choices"][0]
    assert last["finish_reason"] == "length"
    assert ask(states, "GET", f"/{last['state']['id']}/text") | {"id": ""} == (
        ask(states, "GET", f"/{kept(first)['id']}/text") | {"id": ""}
    )


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.5}, {"seed": 3, "temperature": 1.0}])
def test_penalties_and_seeds_hold_over_a_state(states, options):
    """Greedy text with a penalty counts what the state has read, too."""
    state = ask(states, "POST", "", json={"prompt": PROMPT})
    asked = {"max_tokens": 20, "temperature": 0} | options
    assert text_of(states.complete(prompt=PROMPT, **asked)) == text_of(
        states.complete(prompt="", state=state["id"], **asked)
    )


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.5}, {"repetition_penalty": 3.0}, {}])
@pytest.mark.parametrize("prompt", ["", [7, 9]])
def test_echo_with_log_probabilities_changes_no_text(states, prompt, options):
    """The prompt is scored first; the text after it is the same, with the same penalties."""
    state = ask(states, "POST", "", json={"prompt": PROMPT})
    asked = {"prompt": prompt, "state": state["id"], "max_tokens": 20, "temperature": 0} | options
    plain = states.complete(**asked, keep_state=True)
    scored = states.complete(**asked, keep_state=True, echo=True, logprobs=0)["choices"][0]
    at = len(scored["logprobs"]["tokens"]) - plain["usage"]["completion_tokens"]
    assert at == len(prompt)
    assert scored["text"].endswith(text_of(plain))
    tokens = [ask(states, "GET", f"/{one['state']['id']}/text")["tokens"] for one in (plain["choices"][0], scored)]
    assert tokens[0] == tokens[1]


def test_a_state_has_read_the_text_that_was_shown(states):
    """Also where a stop string ends it: not the stop string, nor what was written until the engine was told."""
    plain = text_of(states.complete(prompt=PROMPT, max_tokens=60, temperature=0))
    for stop in (plain[20:24], plain[31:33], plain[7]):
        answer = states.complete(prompt=PROMPT, max_tokens=60, temperature=0, stop=[stop], keep_state=True)
        begin = ask(states, "GET", f"/{ask(states, 'POST', '', json={'prompt': PROMPT})['id']}/text")["text"]
        read = ask(states, "GET", f"/{kept(answer)['id']}/text")
        assert read["text"] == begin + plain[: plain.index(stop)]
        assert read["text"] == begin + text_of(answer)
        assert kept(answer)["tokens"] == len(read["tokens"])


def test_each_of_several_texts_leaves_its_own(states):
    answer = states.complete(prompt=[PROMPT, [9, 9]], n=2, max_tokens=5, seed=1, keep_state={"expires_after": 500})
    found = [choice["state"] for choice in answer["choices"]]
    assert [state["tokens"] for state in found] == [12, 12, 7, 7]
    assert len({state["id"] for state in found}) == 4
    assert all(490 < state["expires_at"] - state["created"] <= 501 for state in found)


def test_forks_and_branches(states):
    answer = states.complete(prompt=PROMPT, max_tokens=40, temperature=0, keep_state=True)
    state, tokens = kept(answer), ask(states, "GET", f"/{kept(answer)['id']}/text")["tokens"]
    fork = ask(states, "POST", f"/{state['id']}/fork", json={"metadata": {"name": "mine"}})
    assert (fork["sha256"], fork["metadata"], fork["parent"]) == (state["sha256"], {"name": "mine"}, state["id"])
    for at in (1, 6, 7, 20, 46, 47):
        branch = ask(states, "POST", f"/{state['id']}/branch", json={"at": at})
        assert (branch["tokens"], branch["origin"], branch["parent"]) == (at, "branch", state["id"])
        assert ask(states, "GET", f"/{branch['id']}/text")["tokens"] == tokens[:at]
        expected = states.complete(prompt=tokens[:at], max_tokens=8, temperature=0)
        assert text_of(states.complete(prompt="", state=branch["id"], max_tokens=8, temperature=0)) == text_of(expected)
    again = ask(states, "POST", f"/{state['id']}/branch", json={"at": 22})
    assert again["usage"]["prompt_tokens"] == 2, "read from the branch at 20"
    error = ask(states, "POST", f"/{state['id']}/branch", 400, json={"at": 48})
    assert "the state's text has 47 tokens" in error["error"]["message"]
    ask(states, "DELETE", f"/{state['id']}")
    ask(states, "GET", f"/{state['id']}", 404)
    assert states.complete(prompt="", state=fork["id"], max_tokens=1)


def test_a_file_is_that_of_the_library(states, model, tmp_path):
    """Exported, it is read by `State.load`; what `State.save` writes is imported."""
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    state = ask(states, "POST", "", json={"prompt": PROMPT})
    data = states.client.get(f"/v1/states/{state['id']}/export").content
    (tmp_path / "x.safetensors").write_bytes(data)
    found, expected = State.load(tmp_path / "x.safetensors", loaded), State.read(loaded, torch.tensor(PROMPT))
    assert torch.equal(found.pending, expected.pending)
    assert torch.allclose(found.cache.ssm_states, expected.cache.ssm_states, atol=1e-6)
    binary = {"Content-Type": "application/octet-stream"}
    again = ask(states, "POST", "/import", content=data, headers=binary)
    assert (again["sha256"], again["tokens"], again["can_branch"]) == (state["sha256"], 7, True)
    expected.save(tmp_path / "y.safetensors", loaded)
    theirs = ask(states, "POST", "/import", content=(tmp_path / "y.safetensors").read_bytes(), headers=binary)
    assert not theirs["can_branch"]
    texts = [
        text_of(states.complete(prompt="", state=one["id"], max_tokens=9, temperature=0))
        for one in (state, again, theirs)
    ]
    assert len(set(texts)) == 1
    assert "not have its tokens" in ask(states, "GET", f"/{theirs['id']}/text", 400)["error"]["message"]
    for content, message in ((data[: len(data) // 2], "not a whole"), (b"", "no safetensors"), (data + b"x", "whole")):
        assert message in ask(states, "POST", "/import", 400, content=content, headers=binary)["error"]["message"]
    damaged = bytearray(data)
    at = data.index(b'"fingerprint":"') + 15
    damaged[at] = ord("0") if damaged[at] != ord("0") else ord("1")
    error = ask(states, "POST", "/import", 409, content=bytes(damaged), headers=binary)
    assert error["error"]["code"] == "state_of_another_model"
    ask(states, "POST", "/import", 415, json={})


def test_scores_from_a_state_and_leaving_one(states):
    pieces = [[5, 17, 99], [3, 42], [8, 250, 7]]
    asked = {"log_probs": True, "continuations": [[3, 42, 8, 250, 7]], "prompt": pieces[0]}
    whole = states.client.post("/v1/score", json=asked).json()["data"][0]
    state, found = ask(states, "POST", "", json={"prompt": pieces[0]})["id"], []
    for piece in pieces[1:]:
        asked = {"log_probs": True, "prompt": "", "continuations": [piece], "state": state, "keep_state": True}
        answer = states.client.post("/v1/score", json=asked)
        assert answer.status_code == 200, answer.text
        (one,) = answer.json()["data"]
        found += one["log_probs"]
        state = one["state"]["id"]
    assert found == pytest.approx(whole["log_probs"], abs=1e-4)
    assert ask(states, "GET", f"/{state}")["tokens"] == 8
    many = states.client.post("/v1/score", json={"prompt": "", "continuations": [[1], [2, 3]], "state": state}).json()
    plain = states.client.post(
        "/v1/score", json={"prompt": [5, 17, 99, 3, 42, 8, 250, 7], "continuations": [[1], [2, 3]]}
    ).json()
    for one, other in zip(many["data"], plain["data"], strict=True):
        assert one["log_prob"] == pytest.approx(other["log_prob"], abs=1e-4)
    both = {"prompt": "", "continuations": [[1], [2]], "state": state, "keep_state": True}
    assert states.client.post("/v1/score", json=both).status_code == 400


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "nothing to read"),
        ({"prompt": ""}, 400, "nothing to read"),
        ({"prompt": [1], "expires_after": 0}, 400, "expires_after"),
        ({"prompt": [1], "metadata": {"a": 1}}, 400, "metadata"),
        ({"prompt": [1], "state": "state_x"}, 404, "there is no state"),
        ({"prompt": [1], "at": 3}, 400, "no field"),
        ({"prompt": [999999]}, 400, "token id"),
    ],
)
def test_bad_requests(states, body, status, message):
    assert message in ask(states, "POST", "", status, json=body)["error"]["message"]


@pytest.mark.parametrize("limit", ["0", "1001", "1.5", "nan", "-inf", "x", ""])
def test_pages_of_a_length_that_is_none(states, limit):
    assert "limit is" in ask(states, "GET", f"?limit={limit}", 400)["error"]["message"]


@pytest.mark.parametrize("query", ["limits=2", "limit=2&limit=3", "after=x&before=y"])
def test_parameters_of_a_page_that_are_none(states, query):
    ask(states, "GET", f"?{query}", status=400)
    error = ask(states, "POST", f"/import?{query}", status=400, content=b"")["error"]
    assert error["param"] in query
    states.complete(prompt="x", max_tokens=1)
    assert states.client.post("/v1/completions?api-version=2", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_deadline_and_a_priority(states):
    response = states.post(prompt=PROMPT, max_tokens=4000, deadline=0.01, ignore_eos=True)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert states.complete(prompt=PROMPT, max_tokens=2, priority=-5, deadline=60)
    assert states.post(prompt=PROMPT, priority=1.5).status_code == 400


def test_a_damaged_file_ends_its_own_text_alone(states, folder):
    good, bad = (ask(states, "POST", "", json={"prompt": [token, 200]}) for token in (61, 62))
    path = folder / "blobs" / bad["sha256"][:2] / f"{bad['sha256']}.safetensors"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    first = states.post(prompt="", state=bad["id"], max_tokens=3)  # one replica has it in memory
    second = [states.post(prompt="", state=bad["id"], max_tokens=3) for _ in range(4)]
    assert {one.status_code for one in (first, *second)} <= {200, 410}
    exported = states.client.get(f"/v1/states/{bad['id']}/export")
    assert (exported.status_code, exported.json()["error"]["code"]) == (410, "state_damaged")
    assert states.complete(prompt="", state=good["id"], max_tokens=3)


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_file_that_no_replica_has_in_memory(model, tmp_path, damage):
    """The documented status, whatever goes on from the state; the log has no traceback."""
    with start(model, tmp_path / "states", tmp_path / "log", "--states-memory-mb", "0") as server:
        server.ready()
        for path, more in (
            ("completions", {"max_tokens": 3}),
            ("completions", {"max_tokens": 3, "stream": True}),
            ("completions", {"max_tokens": 3, "echo": True, "logprobs": 1, "keep_state": True}),
            ("score", {"continuations": ["b"]}),
            ("states", {}),
        ):
            state = ask(server, "POST", "", json={"prompt": PROMPT})
            (file,) = (tmp_path / "states" / "blobs").rglob("*.safetensors")
            if damage == "gone":
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[:-1] + b"?")
            answer = server.client.post(f"/v1/{path}", json={"prompt": "a", "state": state["id"]} | more)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (410, "state_damaged"), (path, more, error)
            assert error["message"].endswith("make the state again")
            assert "ApiError" not in error["message"]
            ask(server, "DELETE", f"/{state['id']}")
        assert server.complete(prompt="a", max_tokens=1)
        assert "Traceback" not in server.log.read_text()


def test_a_file_of_huge_numbers_is_its_clients_fault(states):
    """They are finite, and no token can be chosen after them: its texts are refused, and nothing else is affected."""
    good = ask(states, "POST", "", json={"prompt": [71, 200]})
    data = states.client.get(f"/v1/states/{good['id']}/export").content
    (length,) = struct.unpack("<Q", data[:8])
    begin, end = json.loads(data[8 : 8 + length])["ssm_states"]["data_offsets"]
    first = 8 + length
    huge = data[: first + begin] + struct.pack("<f", 3e38) * ((end - begin) // 4) + data[first + end :]
    kind = {"Content-Type": "application/octet-stream"}
    bad = states.client.post("/v1/states/import", content=huge, headers=kind)
    assert bad.status_code == 200, bad.text
    asked = {"prompt": "a", "state": bad.json()["id"]}
    for path, more in (
        ("completions", {"max_tokens": 3}),
        ("completions", {"max_tokens": 3, "logprobs": 1}),
        ("completions", {"max_tokens": 3, "logprobs": 1, "echo": True}),
        ("score", {"continuations": ["b"]}),
        ("score", {"continuations": ["b"], "keep_state": True}),
    ):
        answer = states.client.post(f"/v1/{path}", json=asked | more)
        assert (answer.status_code, " NaN" in answer.text) == (400, True), (path, more, answer.text)
    assert states.complete(prompt="", state=good["id"], max_tokens=3)
    assert not any(replica["restarts"] for replica in states.health()["replicas"])


def test_killed_and_started_again(model, tmp_path):
    """SIGKILL of server and replicas under load: every state that was acknowledged goes on as it would have."""
    with start(model, tmp_path / "states", tmp_path / "log") as server:
        server.ready()
        expected = {}
        for number in range(5):
            answer = server.complete(prompt=[*PROMPT, number], max_tokens=5, temperature=0, keep_state=True)
            text = text_of(server.complete(prompt="", state=kept(answer)["id"], max_tokens=9, temperature=0))
            expected[kept(answer)["id"]] = text
        # Asked before the text begins: between its first line and the signals nothing else may take time, or it ends.
        pids = [replica["pid"] for replica in server.health()["replicas"]]
        with server.client.stream(
            "POST", "/v1/completions", json={"prompt": PROMPT, "max_tokens": 3000, "stream": True, "keep_state": True}
        ) as running:
            next(running.iter_lines())
            for pid in (*pids, server.process.pid):
                os.kill(pid, signal.SIGKILL)
    with start(model, tmp_path / "states", tmp_path / "log") as server:
        server.ready()
        for id, text in expected.items():
            assert text_of(server.complete(prompt="", state=id, max_tokens=9, temperature=0)) == text
        listed = {state["id"] for state in ask(server, "GET", "")["data"]}
        assert listed == set(expected), "the one that was not acknowledged is not there"


def test_a_chat_goes_on_from_a_state(chat_model, tmp_path):
    """New messages alone: the state stands where all messages would, and no token is read twice."""
    options = ("--model", chat_model, "--served-model-name", "tiny", "--states", str(tmp_path / "states"))
    with serving(tmp_path / "log", *options) as server:
        server.ready()
        first = [{"role": "user", "content": "one two"}]
        then = [{"role": "user", "content": "and three"}]
        asked = {"max_tokens": 8, "temperature": 0, "keep_state": True}

        def chat(messages: list[dict[str, str]], **more: Any) -> dict[str, Any]:
            answer = server.client.post("/v1/chat/completions", json=asked | {"messages": messages} | more)
            assert answer.status_code == 200, answer.text
            return answer.json()

        turn = chat(first)
        reply, state = turn["choices"][0]["message"]["content"], kept(turn)
        assert state["origin"] == "chat"
        second = chat(then, state=state["id"])
        whole = chat([*first, {"role": "assistant", "content": reply}, *then])
        assert second["choices"][0]["message"]["content"] == whole["choices"][0]["message"]["content"]
        shown = [ask(server, "GET", f"/{kept(one)['id']}/text")["text"] for one in (second, whole)]
        assert shown[0] == shown[1]
        assert second["usage"]["prompt_tokens"] < whole["usage"]["prompt_tokens"]
        events = server.client.post(
            "/v1/chat/completions", json=asked | {"messages": then, "state": state["id"], "stream": True}
        ).text
        last = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")][-1]
        assert last["choices"][0]["state"]["tokens"] == kept(second)["tokens"]


def test_without_a_folder(server):
    error = ask(server, "GET", "", 400)["error"]
    assert (error["code"], "--states" in error["message"]) == ("states_off", True)
    assert server.post(prompt=[1], keep_state=True, max_tokens=1).json()["error"]["code"] == "states_off"


def test_a_folder_that_cannot_be_written(model):
    command = ["python", "-m", "mambakit", "serve", "--model", model, "--states", "/proc/x", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "--states" in done.stderr
    assert "cannot be written to" in done.stderr
