"""The model's name, and the OpenAPI document."""

from __future__ import annotations

import httpx
import pytest

from mambakit.serving.http.access import AccessRules
from tests.serving.api_server import LIMITS, api_server


@pytest.fixture(scope="module")
def client():
    with api_server(access=AccessRules()) as one, httpx.Client(base_url=f"http://{one.host}") as client:
        yield client


def test_the_model_by_name(client):
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["m"]
    assert client.get("/v1/models/m").json() == listed["data"][0]
    other = client.get("/v1/models/state-spaces/other")
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
    assert '"state-spaces/other"' in other.json()["error"]["message"]


def _schema(document, path):
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def test_the_document_has_every_route_and_the_limits_of_this_server(client):
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert {"/v1/completions", "/v1/models", "/v1/models/{model}", "/health", "/openapi.json"} <= set(document["paths"])
    fields = _schema(document, "/v1/completions")
    assert fields["required"] == ["prompt"]
    assert fields["properties"]["model"]["enum"] == ["m", None]
    assert fields["properties"]["max_tokens"]["maximum"] == LIMITS.max_new_tokens
    assert fields["properties"]["temperature"]["maximum"] == 2
    assert fields["additionalProperties"] is False
    text, chat = _schema(document, "/tokenize")["anyOf"]
    assert (text["required"], chat["required"]) == (["prompt"], ["messages"])
    assert text["properties"]["prompt"]["type"] == "string"
    assert text["properties"]["messages"] == chat["properties"]["prompt"] == {"type": "null"}
    prompt, state = _schema(document, "/v1/states")["anyOf"]
    assert (prompt["required"], state["required"]) == (["prompt"], ["state"])
    for path, methods in document["paths"].items():
        for method in methods:
            place = path.replace("{model}", "m").replace("{name}", "app.js")
            answer = client.request(method, place, json={} if method == "post" else None)
            assert answer.status_code not in (404, 405), (method, path)
