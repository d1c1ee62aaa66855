"""The server on Ray Serve: a local cluster, two replicas, and one of them killed under load."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from mambakit import AutoModelForCausalLM, AutoTokenizer
from mambakit.errors import UsageError
from mambakit.generation.stream import SamplingParams, Stream
from mambakit.serving.dispatch.queue import EARLY
from mambakit.serving.ray_app import read_arguments
from tests.serving.conftest import ROOT, wait_until

# -- arguments ---------------------------------------------------------------------------------------------------------


def test_arguments_from_the_command_line(tmp_path):
    config = tmp_path / "ray.toml"
    config.write_text('slots = 3\nmax_replicas = 4\nname = "from the file"\nplayground = false\n')
    given = {"config": str(config), "slots": "5", "gpus_per_replica": "0.5", "allowed_host": "a.example,b.example"}
    of_ray, options = read_arguments(given)
    assert (of_ray.min_replicas, of_ray.max_replicas, of_ray.gpus_per_replica) == (1, 4, 0.5)
    assert (options.worker.slots, options.name, options.playground) == (5, "from the file", False)
    assert options.devices == ("cuda",) * 4
    assert options.access.hosts == ("a.example", "b.example")
    assert not options.access.loopback
    of_ray, options = read_arguments({"min_replicas": 2, "model": "state-spaces/mamba-130m-hf"})
    assert (of_ray.max_replicas, options.devices, options.name) == (2, ("cpu", "cpu"), "state-spaces/mamba-130m-hf")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"replicas": "2"}, 'no argument "replicas"'),
        ({"device": "cpu"}, 'no argument "device"'),
        ({"slots": "many"}, 'slots is "many"; it must be of type int'),
        ({"slots": True}, "slots is true"),
        ({"playground": "yes"}, 'playground is "yes"'),
        ({"model": 3}, "model is 3"),
        ({"config": "/no/such/file.toml"}, "/no/such/file.toml"),
        ({"allowed_origin": "example.org"}, "--allowed-origin"),
    ],
)
def test_arguments_that_are_wrong(given, says):
    with pytest.raises((UsageError, ValueError), match=".") as caught:
        read_arguments(given)
    assert says in str(caught.value)


# -- a cluster ---------------------------------------------------------------------------------------------------------

APP = """
import json, signal, sys, time
import ray
from ray import serve
from mambakit.serving.dispatch.queue import EARLY
from mambakit.serving.ray_app import build

ray.init(num_cpus=4, include_dashboard=False, logging_level="error")
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(build(json.loads(sys.argv[2])), name="mambakit", route_prefix="/")
print("running", flush=True)
sys.stdin.readline()
serve.shutdown()
ray.shutdown()
"""
PATIENCE = 600.0  # a cluster starts a dozen processes; minutes, on a busy machine


class Cluster:
    """A Ray of its own process, with the application on a port."""

    def __init__(self, folder: Path, **arguments):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.log = folder / "log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", APP, str(port), json.dumps(arguments)], stdin=subprocess.PIPE, stdout=log,
                stderr=log, env=environment, text=True, cwd=folder,
            )  # fmt: skip
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE)

    def states(self) -> list[str]:
        """Of the replicas; none before they are there."""
        assert self.process.poll() is None, self.log.read_text()
        time.sleep(0.2)  # a cluster has other things to do
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
            return [replica["state"] for replica in self.replicas()]
        return []

    def replicas(self) -> list[dict]:
        return self.client.get("/health").json()["replicas"]

    def complete(self, **body) -> dict:
        answer = self.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    def close(self) -> None:
        self.client.close()
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.communicate("\n", timeout=60)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def cluster(model, tmp_path_factory):
    pytest.importorskip("ray.serve")
    folder = tmp_path_factory.mktemp("ray")
    one = Cluster(
        folder, model=model, name="tiny", min_replicas=1, max_replicas=2, slots=2, upscale_seconds=0.5,
        cpus_per_replica=0.5, max_new_tokens=100_000, prefix_cache_bytes=1 << 26, states_folder=str(folder / "states"),
    )  # fmt: skip
    try:
        wait_until(lambda: "ready" in one.states(), "a replica is ready", PATIENCE)
        yield one
    finally:
        one.close()


BODY = {"prompt": "The cat sat on the mat", "temperature": 0, "max_tokens": 24}


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
def test_it_writes_what_the_model_writes(cluster, model):
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    ids = tokenizer(BODY["prompt"], return_tensors="pt").input_ids[0]
    alone = Stream(loaded, tokenizer, ids, max_new_tokens=24, sampling=SamplingParams(temperature=0.0))
    assert cluster.complete(**BODY)["text"] == "".join(alone)
    with cluster.client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    assert text == cluster.complete(**BODY)["text"]
    refused = cluster.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 0.5})
    assert refused.status_code == 400
    assert refused.headers["X-Request-Id"]


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
def test_more_replicas_under_load_and_one_killed(cluster):
    assert sorted(cluster.states()) == ["asleep", "ready"]
    expected = cluster.complete(**BODY | {"max_tokens": 400})["text"]
    ended = threading.Event()

    def ask() -> list[httpx.Response]:
        """One client of the load: a request after the other."""
        found = []
        while not ended.is_set():
            found.append(cluster.client.post("/v1/completions", json=BODY | {"max_tokens": 400}))
        return found

    def both(what: str) -> bool:
        return all(replica["state"] == "ready" and replica[what] for replica in cluster.replicas())

    with ThreadPoolExecutor(12) as pool:
        load = [pool.submit(ask) for _ in range(8)]
        try:
            wait_until(lambda: cluster.states() == ["ready", "ready"], "the other replica is started", PATIENCE)
            kept = cluster.complete(**BODY, keep_state=True)
            wait_until(lambda: both("busy"), "both write", PATIENCE)
            victim, survivor = cluster.replicas()
            os.kill(victim["pid"], signal.SIGKILL)
            time.sleep(2)
        finally:
            ended.set()
        answers = [answer for client in load for answer in client.result()]
    assert {answer.status_code for answer in answers} == {200, 503}
    whole = [answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200]
    assert set(whole) == {expected}, "none is wrong"
    lost = [answer.json()["error"]["message"] for answer in answers if answer.status_code == 503]
    assert 1 <= len(lost) <= 2 * EARLY, "the texts that it had"
    assert all("killed by signal 9" in message for message in lost)
    wait_until(lambda: cluster.states() == ["ready", "ready"], "it is started again", PATIENCE)
    assert cluster.replicas()[0]["restarts"] == 1
    assert cluster.replicas()[1]["pid"] == survivor["pid"]

    # Whichever replica wrote it: a state that was kept is there.
    after = cluster.complete(prompt="", state=kept["state"]["id"], temperature=0, max_tokens=8)["text"]
    assert kept["text"] + after == cluster.complete(**BODY | {"max_tokens": 32})["text"]


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
def test_an_actor_that_is_lost_takes_its_process_along(cluster):
    wait_until(lambda: "ready" in cluster.states(), "a replica is ready", PATIENCE)
    pid = next(replica["pid"] for replica in cluster.replicas() if replica["state"] == "ready")
    actor = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])  # its parent
    kept = cluster.complete(**BODY, keep_state=True)
    os.kill(actor, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the worker has ended, too", PATIENCE)
    wait_until(lambda: any(replica["restarts"] for replica in cluster.replicas()), "it is noticed", PATIENCE)
    wait_until(lambda: "ready" in cluster.states(), "a replica is ready", PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while True:
        answer = cluster.client.post(
            "/v1/completions", json={"prompt": "", "state": kept["state"]["id"], "temperature": 0, "max_tokens": 8}
        )
        if answer.status_code == 200:
            break
        assert answer.status_code == 503
        assert time.monotonic() < deadline
        time.sleep(1)
    assert kept["text"] + answer.json()["choices"][0]["text"] == cluster.complete(**BODY | {"max_tokens": 32})["text"]
