"""Requests of any kind to a server: valid and invalid ones of its OpenAPI document, and raw bytes.

    python benchmarks/fuzz_serving.py --requests 10000                  # starts a server of the embedded model
    python benchmarks/fuzz_serving.py --url http://127.0.0.1:8000       # one that runs

Of the requests, nine in ten are made from the document (by schemathesis): half of them follow it, half of them do not.
Most of those that name a state name one that is there. The others are bytes: requests that are cut, changed or no HTTP
at all. Each answer must have a status that the document has, be in its schema and come in --seconds. None may be a 5xx,
but for a 503 with Retry-After, a 504 to a request with a ``deadline``, and a 505, the answer to bytes that are another
version of HTTP. In the end no replica has died, no slot is taken, and a greedy text is the one from before. Ends with
status 1 where one of that fails, with the first requests that did.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.serving.chat_template import TEMPLATE

PATIENCE = 60.0
# A server that answers fast: what is fuzzed are requests, not long texts.
SERVER = ("--slots", "4", "--max-new-tokens", "8", "--max-texts", "8", "--max-prompt-tokens", "256")


class Findings:
    """Statuses of the answers, and what was wrong."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.wrong: list[str] = []

    def note(self, kind: str, status: int | None, wrong: str | None = None) -> None:
        self.statuses[f"{kind} {status}"] += 1
        if wrong is not None:
            self.wrong.append(f"{kind}: {wrong}")


def fuzz(url: str, requests: int, seed: int = 0, seconds: float = PATIENCE) -> Findings:
    """Send about so many requests, and compare the server before and after them."""
    findings = Findings()
    before = _text(url, seconds), _replicas(url, seconds)
    documented = requests * 9 // 10
    _fuzz_document(url, documented, seed, seconds, findings)
    _fuzz_bytes(url, requests - documented, seed, seconds, findings)
    end = time.monotonic() + seconds
    while any(one["busy"] or one["waiting"] for one in _replicas(url, seconds)) and time.monotonic() < end:
        time.sleep(0.1)
    for one, then in zip(_replicas(url, seconds), before[1], strict=True):
        if one["busy"] or one["waiting"] > 0:
            findings.wrong.append(f"replica {one['replica']} has {one['busy']} taken slots and {one['waiting']} texts")
        if one["restarts"] != then["restarts"] or one["state"] != "ready":
            findings.wrong.append(f"replica {one['replica']} died: {one['error']}")
    if _text(url, seconds) != before[0]:
        findings.wrong.append("a greedy text is another one than before")
    return findings


def _fuzz_document(url: str, requests: int, seed: int, seconds: float, findings: Findings) -> None:
    import requests as http
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.core.failures import FailureGroup
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    wanted = [not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
              checks.response_schema_conformance]  # fmt: skip
    operations = [found.ok() for found in schema.get_all_operations()]
    posts = [one for one in operations if one.method == "post"]
    gets = [one for one in operations if one not in posts and one.path_parameters]
    share = max(1, requests // (8 * len(posts) + 2 * len(gets)))
    session = http.Session()

    rng = random.Random(seed)
    state = _State(url, seconds)

    def send(case: Any, kind: str) -> None:
        for fields in (case.path_parameters, case.body):
            if isinstance(fields, dict) and "state" in fields and rng.random() < 0.75:
                fields["state"] = state.id()
        if isinstance(case.body, dict) and "at" in case.body and "positive" in kind and rng.random() < 0.75:
            case.body["at"] = rng.randrange(1, 4)  # tokens that the state has
        if isinstance(case.body, dict) and "positive" in kind:  # many valid fields together contradict each other
            schema = case.operation.body[0].raw_schema
            required = [name for one in (schema, *schema.get("anyOf", ())) for name in one.get("required", ())]
            others = [name for name in case.body if name not in required]
            kept = {*required, *rng.sample(others, min(len(others), rng.randrange(5)))}
            case.body = {name: value for name, value in case.body.items() if name in kept}
        try:
            response = case.call(session=session, timeout=seconds)
        except http.RequestException as error:  # no answer in time, or none at all
            findings.note(kind, None, f"{type(error).__name__}: {case.as_curl_command()[:1000]}")
            return
        wrong = None
        late = response.status_code == 504 and isinstance(case.body, dict) and "deadline" in case.body
        if not (response.status_code in (429, 503) and "retry-after" in response.headers):
            try:
                case.validate_response(response, checks=wanted[1:] if late else wanted)
            except (Exception, FailureGroup) as error:
                wrong = f"{error}"[:2000]
        findings.note(kind, response.status_code, wrong)

    for operation in operations:
        name = f"{operation.method.upper()} {operation.path}"
        modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
        for mode in modes if operation in posts else modes[:1]:
            count = share * (4 if operation in posts else 2)
            kind = f"{name} ({mode.value})"
            _draw(operation.as_strategy(generation_mode=mode), count, seed, functools.partial(send, kind=kind))


class _State:
    """A state that is there, made again where a request has deleted it; any name where the server keeps none."""

    def __init__(self, url: str, seconds: float):
        self._url, self._seconds, self._id = f"{url}/v1/states", seconds, "state_0"

    def id(self) -> str:
        import requests as http

        if http.get(f"{self._url}/{self._id}", timeout=self._seconds).status_code == 404:
            made = http.post(self._url, json={"prompt": "A state"}, timeout=self._seconds).json()
            self._id = made.get("id", self._id)
        return self._id


def _draw(cases: Any, count: int, seed: int, send: Callable[[Any], None]) -> None:
    """Call ``send`` with ``count`` examples of a strategy."""
    import hypothesis

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(case=cases)
    def run(case: Any) -> None:
        send(case)

    run()


def _fuzz_bytes(url: str, requests: int, seed: int, seconds: float, findings: Findings) -> None:
    address = urlsplit(url)
    rng = random.Random(seed)
    for _ in range(requests):
        sent = _bytes(rng, address.netloc.encode())
        try:
            with socket.create_connection((address.hostname, address.port), timeout=seconds) as client:
                with contextlib.suppress(OSError):  # it may have closed already
                    client.sendall(sent)
                    client.shutdown(socket.SHUT_WR)
                received = b""
                with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                    while part := client.recv(1 << 16):
                        received += part
        except OSError as error:
            findings.note("bytes", None, f"{error!r} after {sent[:300]!r}")
            continue
        while received.startswith(b"HTTP/1.1 100"):
            received = received.partition(b"\r\n\r\n")[2]
        status = int(received[9:12]) if received.startswith(b"HTTP/1.1 ") else None
        failed = status is not None and status >= 500 and b"retry-after" not in received.lower()
        failed = failed and not (status == 505 and not sent.partition(b"\r\n")[0].rstrip().endswith(_VERSIONS))
        findings.note("bytes", status, f"{received[:300]!r} after {sent[:300]!r}" if failed else None)


_VERSIONS = (b"HTTP/1.1", b"HTTP/1.0")
_BODIES = (
    {"prompt": "a", "max_tokens": 2},
    {"prompt": ["a", "b"], "stream": True, "max_tokens": 2, "logprobs": 1, "echo": True},
    {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    {"prompt": "a", "continuations": ["b"]},
    {"tokens": [1, 2]},
)
_PATHS = (
    b"/v1/completions",
    b"/v1/chat/completions",
    b"/v1/score",
    b"/tokenize",
    b"/detokenize",
    b"/v1/models",
    b"/%00",
)
_ODD_HEADERS = (
    b"Transfer-Encoding: chunked", b"X-Request-Id: \xff", b"Authorization: Bearer \x80", b": ", b"Host: b", b"X" * 300,
)  # fmt: skip


def _bytes(rng: random.Random, host: bytes) -> bytes:
    """A request that is wrong in some way, usually."""
    body = json.dumps(rng.choice(_BODIES)).encode()
    method = rng.choice([b"POST", b"POST", b"GET", b"PUT", b"OPTIONS", b"\xff"])
    length = str(max(0, len(body) + rng.choice([0, 0, 0, -3, 5]))).encode()
    headers = [b"Host: " + host, b"Content-Type: application/json", b"Content-Length: " + length, b"Connection: close"]
    if rng.random() < 0.3:
        headers[rng.randrange(len(headers))] = rng.choice(_ODD_HEADERS)
    sent = bytearray(method + b" " + rng.choice(_PATHS) + b" HTTP/1.1\r\n" + b"\r\n".join(headers) + b"\r\n\r\n" + body)
    for _ in range(rng.choice([0, 0, 1, 1, 3, 30])):
        kind, at = rng.randrange(4), rng.randrange(max(1, len(sent) - 1))
        if kind == 0:
            sent[at : at + 1] = rng.randbytes(1)
        elif kind == 1:
            del sent[at : at + rng.randrange(1, 9)]
        elif kind == 2:
            sent[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            sent = sent[: at + 1]
    return bytes(sent) if rng.random() < 0.95 else rng.randbytes(rng.randrange(1, 2000))


def _replicas(url: str, seconds: float) -> list[dict[str, Any]]:
    import requests as http

    found: list[dict[str, Any]] = http.get(f"{url}/health", timeout=seconds).json()["replicas"]
    return found


def _text(url: str, seconds: float) -> str:
    import requests as http

    body = {"prompt": "The", "max_tokens": 8, "temperature": 0}
    answer = http.post(f"{url}/v1/completions", json=body, timeout=seconds).json()
    text: str = answer["choices"][0]["text"]
    return text


@contextlib.contextmanager
def _server(arguments: list[str]) -> Iterator[str]:
    command = [sys.executable, "-m", "mambakit", "serve", "--port", "0", "--log-level", "error", *SERVER]
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template.jinja"
        template.write_text(TEMPLATE)
        kept = ("--states", f"{folder}/states", "--prefix-cache", "--chat-template", str(template))
        with _process([*command, *kept, *arguments]) as url:
            yield url


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split(" at ")[1].split(",")[0]
            _wait(url)
            yield url
        finally:
            process.terminate()


def _wait(url: str) -> None:
    import requests as http

    end = time.monotonic() + 10 * PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(http.RequestException):  # a machine that is busy with other work
            if http.get(f"{url}/ready", timeout=PATIENCE).status_code == 200:
                return
        time.sleep(0.2)
    raise TimeoutError(f"no replica of {url} is ready")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a server that runs; without it one is started")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=PATIENCE, help="for an answer")
    options, server = parser.parse_known_args()
    began = time.monotonic()
    with contextlib.nullcontext(options.url) if options.url else _server(server) as url:
        findings = fuzz(url, options.requests, options.seed, options.seconds)
    for kind, count in sorted(findings.statuses.items()):
        print(f"{count:7,}  {kind}")
    print(f"{sum(findings.statuses.values()):7,}  requests in {time.monotonic() - began:.0f} s")
    for wrong in findings.wrong[:20]:
        print(f"\n{wrong}")
    print(f"\n{len(findings.wrong)} failures")
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
