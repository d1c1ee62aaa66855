"""Real servers: `mambakit serve` with replicas, each on a port of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import mambakit
from tests.models.tiny import save_tiny
from tests.serving.chat_template import TEMPLATE

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return value


class Server:
    """`mambakit serve` in a process, and a client of it."""

    def __init__(self, log: Path, *arguments: str, **environment: str):
        self.log = log
        command = [sys.executable, "-m", "mambakit", "serve", "--device", "cpu", "--port", "0", *arguments]
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=env, cwd=ROOT)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert " at http" in self.line, self.log.read_text()
        self.url = self.line.split(" at ")[1].split(",")[0]
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def health(self) -> dict[str, Any]:
        return self.client.get("/health").json()

    def ready(self) -> Server:
        wait_until(
            lambda: self.health()["status"] == "ok" or self.process.poll(), "every replica is ready", 3 * PATIENCE
        )
        assert self.process.poll() is None, self.log.read_text()
        return self

    def post(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json=body)

    def complete(self, **body: Any) -> dict[str, Any]:
        response = self.post(**body)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, **body: Any) -> Iterator[dict[str, Any]]:
        """The events; the last is {} where the stream said that it is done."""
        with self.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line:
                    data = line.removeprefix("data: ")
                    yield {} if data == "[DONE]" else json.loads(data)

    def metrics(self) -> dict[str, float]:
        lines = self.client.get("/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def serving(log: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    server = Server(log, *arguments, **environment)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="package")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, eos_token_id=303)  # no token of its tokenizer: texts run to their full length
    return str(folder)


@pytest.fixture(scope="package")
def chat_model(tmp_path_factory) -> str:
    """A model with an end-of-text token that its tokenizer knows, and a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    save_tiny(folder, eos_token_id=0)
    tokenizer = mambakit.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == 0
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="package")
def chat_server(chat_model, tmp_path_factory) -> Iterator[Server]:
    """One replica of four slots."""
    options = ("--model", chat_model, "--served-model-name", "tiny", "--slots", "4", "--max-new-tokens", "200")
    with serving(tmp_path_factory.mktemp("chat-serve") / "log", *options) as server:
        yield server.ready()


@pytest.fixture(scope="package")
def server(model, tmp_path_factory) -> Iterator[Server]:
    """Two replicas of two slots."""
    options = ("--model", model, "--served-model-name", "tiny", "--replicas", "2", "--slots", "2")
    with serving(tmp_path_factory.mktemp("serve") / "log", *options, "--max-new-tokens", "1000000") as server:
        yield server.ready()
