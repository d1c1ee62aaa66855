"""X-Request-Id, in and out, on every kind of answer."""

from __future__ import annotations

import httpx
import pytest

from mambakit.serving.http.access import AccessRules
from mambakit.serving.http.keys import Keys
from tests.serving.api_server import api_server

KEY = "k" * 20


@pytest.fixture(scope="module")
def client():
    with (
        api_server(access=AccessRules(keys=Keys.of(KEY))) as one,
        httpx.Client(base_url=f"http://{one.host}") as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("path", "status"),
    [("/live", 200), ("/v1/models", 401), ("/nowhere", 404), ("/v1/completions", 405)],
)
def test_every_answer_has_the_id(client, path, status):
    answer = client.get(path, headers={"X-Request-Id": "mine-1"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine-1")
    made = [client.get(path).headers["x-request-id"] for _ in range(2)]
    assert len(set(made)) == 2
    assert all(id.startswith("req_") for id in made)


def test_streams_and_refused_hosts_have_it(client):
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "s"}
    body = {"prompt": "a", "max_tokens": 2, "stream": True}
    assert client.post("/v1/completions", json=body, headers=headers).headers["x-request-id"] == "s"
    refused = client.get("/live", headers={"Host": "elsewhere.example", "X-Request-Id": "h"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (403, "h")


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, "é"])
def test_an_id_that_is_none_is_refused(client, sent):
    answer = client.get("/live", headers={"X-Request-Id": sent.encode()})
    assert answer.status_code == 400
    assert "1 to 128 visible ASCII characters" in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"].startswith("req_")
