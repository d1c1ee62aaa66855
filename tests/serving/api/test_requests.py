"""Whatever JSON a client writes: a text, or a 4xx that names the field. Never an exception, never a replica's death."""

from __future__ import annotations

import json
import random

import pytest
import torch
from starlette.responses import JSONResponse

import mambakit
from mambakit.generation.engine import Engine, Request
from mambakit.generation.stream import Sampling, StoppingDecoder
from mambakit.serving.api.asked import parse_body
from mambakit.serving.api.checks import MOST_STOP_CHARACTERS
from mambakit.serving.api.completions import COMPLETIONS, parse
from mambakit.serving.api.declarations import Limits
from mambakit.serving.errors import ApiError

pytestmark = pytest.mark.filterwarnings("ignore")

LIMITS = Limits(model="tiny", vocab_size=304, max_new_tokens=4, max_prompt_tokens=50, most_texts=4)
# As a client may spell them.
NUMBERS = [
    "0", "1", "2", "-1", "1.0", "2.0", "-0.0", "0.5", "1e0", "1e-8", "1e-45", "5e-324", "1e-300", "1e308", "1e400",
    "-1e400", "NaN", "Infinity", "-Infinity", "1e16", "2147483648", "9223372036854775807", "9223372036854775808",
    "-9223372036854775808", "18446744073709551616", "1" + "0" * 400, "-1" + "0" * 4000,
    "0.1000000000000000055511151231257827", "3", "100", "100.0", "303", "304",
]  # fmt: skip
OTHERS = [
    "null", "true", "false", '""', '"a"', '"1"', '"tiny"', '"\\ud800"', '"a\\udfff"', '"\\u0000"', '"日本語 🙂"',
    '"<|endoftext|>"', "[]", "[[]]", "[[1]]", "[1]", "[1.0]", "[true]", "[null]", "[-1]", "[304]", "[1,300]",
    "[[1],[2,3]]", "[[1],2]", '["a","b"]', '["a",1]', '["a",""]', '["a","b","c","d","e"]', "[[[1]]]", "{}", '{"a":1}',
    '{"include_usage":true}', '{"include_usage":1}', '{"5":100}', '{"\\ud800":1}', '"' + "x" * 5000 + '"',
    "[" + "1," * 60 + "1]", "[" * 200 + "]" * 200, "[1e400]", "[" + "9" * 300 + "]", '{"include_usage":false,"b":2}',
]  # fmt: skip
NAMES = [*COMPLETIONS, "metadata", "best-of", "", "\\ud800", "x" * 5000, "Temperature", "max_new_tokens", "日"]


@pytest.fixture(scope="module")
def replica(model):
    """An engine and a tokenizer."""
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    return Engine(loaded, 4), mambakit.AutoTokenizer.from_pretrained(model)


def answer(body: bytes) -> ApiError | object:
    """The request, or its refusal, which can be sent."""
    try:
        return parse(parse_body(body), LIMITS)
    except ApiError as caught:
        error = caught
    assert 400 <= error.status < 500
    assert error.retry_after is None
    assert len(error.message) < 700
    assert json.loads(JSONResponse(error.body).body)["error"]["message"] == error.message
    return error


def write(asked, engine: Engine, tokenizer) -> None:
    """As a replica does."""
    requests = []
    for prompt in asked.prompts:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids[:20] or [0] if isinstance(prompt, str) else prompt
        samplings = [Sampling(**asked.sampling_of(copy)) for copy in range(asked.n)]
        requests += [Request(torch.tensor(ids), sampling, asked.max_tokens) for sampling in samplings]
    for request in engine.write(requests):
        assert request.finish_reason in ("length", "stop")
        shown = StoppingDecoder(tokenizer, asked.stop)
        for token in request.tokens:
            if not shown.stopped:
                shown.push(token)
        shown.rest()


def test_every_value_in_every_field(replica):
    taken, refused, written = 0, 0, set()
    for name in NAMES:
        for value in NUMBERS + OTHERS:
            start = '"prompt":"The cat",' if name != "prompt" else ""
            found = answer(f'{{{start}"{name}":{value}}}'.encode())
            if isinstance(found, ApiError):
                refused += 1
                if "not JSON" not in found.message:
                    assert found.param is not None, (name, value)
                    assert found.param.startswith(
                        json.loads(f'"{name}"')[:90].encode(errors="backslashreplace").decode()
                    ), found.message
                continue
            taken += 1
            if repr(found) not in written:
                write(found, *replica)
                written.add(repr(found))
    assert taken > 100
    assert refused > 1500


def test_random_requests(replica):
    rng, taken = random.Random(0), 0
    likely = {
        "temperature": ["0", "1", "5e-324", "1e-300", "2.0"], "top_p": ["1", "5e-324", "0.5"],
        "top_k": ["0", "5.0", "2147483648"], "min_p": ["1", "0", "1e-300"],
        "repetition_penalty": ["2", "5e-324", "100", "1e-30"], "seed": ["-9223372036854775808", "7.0"],
        "max_tokens": ["4", "2.0"], "stop": ['"a"', '["\\u0000","b"]', "[]"], "n": ["1.0", "2"],
        "prompt": ['"The"', "[1,2]", '["a",""]'], "stream": ["true", "null"], "echo": ["true"], "user": ['"x"'],
        "model": ['"tiny"'], "best_of": ["1.0"], "logit_bias": ["{}"],
    }  # fmt: skip
    for _ in range(150):
        fields = {"prompt": '"The cat"'}
        for name in rng.sample(sorted(likely), rng.randint(1, 9)):
            fields[name] = rng.choice(likely[name]) if rng.random() < 0.93 else rng.choice(NUMBERS + OTHERS)
        found = answer(("{" + ",".join(f'"{n}":{v}' for n, v in fields.items()) + "}").encode())
        if not isinstance(found, ApiError):
            taken += 1
            write(found, *replica)
    assert taken > 50


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (b'{"prompt":"a","prompt":"b"}', "prompt", 'the field "prompt" is there twice'),
        (
            b'{"prompt":"a","stream":true,"stream_options":{"include_usage":true,"include_usage":true}}',
            "include_usage",
            "twice",
        ),
        (b'{"prompt":"a","\\ud800":1,"\\ud800":2}', "\\ud800", "twice"),
        (b'{"prompt":"a","repetition_penalty":' + b"1" * 5000 + b"}", None, "thousands of digits"),
        (
            b'{"prompt":"a","stop":"' + b"x" * (MOST_STOP_CHARACTERS + 1) + b'"}',
            "stop",
            "has 4,097 characters; at most 4,096",
        ),
        (b'{"prompt":"a","stream_options":null,"stream":true,"stop":["a",null]}', "stop", "none of them empty"),
        (b'{"prompt":["a","b","c","d","e"]}', "prompt", "at most 4 can run and wait"),
        (b'{"prompt":["a","b","c"],"n":2}', "n", "at most 4 can run and wait"),
        (b'{"prompt":' + b"[" + b"1," * 50 + b"1]}", "prompt", "has 51 tokens; at most 50"),
        (b'{"prompt":"\xed\xa0\x80"}', "prompt", "half of a surrogate pair"),
        (b'{"prompt":"a","model":5}', "model", "model is 5; it must be a string"),
        (b'{"prompt":"a","user":{"id":1}}', "user", "it must be a string"),
        (b"null", None, "a JSON NoneType"),
        (b"1e400", None, "a JSON float"),
    ],
)
def test_refusals(body, param, says):
    found = answer(body)
    assert isinstance(found, ApiError)
    assert (found.param, found.status) == (param, 400)
    assert says in found.message


def test_numbers_are_coerced():
    asked = parse(
        parse_body(b'{"prompt":"a","repetition_penalty":2,"top_k":3.0,"max_tokens":2.0,"n":1.0,"temperature":-0.0}'),
        LIMITS,
    )
    assert repr(asked.sampling["repetition_penalty"]) == "2.0"
    assert repr(asked.sampling["top_k"]) == "3"
    assert repr(asked.sampling["temperature"]) == "0.0"
    assert (asked.max_tokens, asked.n) == (2, 1)


def test_over_http(server):
    """The same, to real replicas: none dies, and what is refused can be sent."""
    bodies = ["{}", "", "[", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), '{"prompt":"a","prompt":"a"}']
    names = (
        "temperature",
        "repetition_penalty",
        "top_p",
        "top_k",
        "seed",
        "max_tokens",
        "n",
        "stop",
        "\\ud800",
        "user",
        "model",
    )
    values = ["2", "1e-300", "5e-324", "1.0", "NaN", "true", '"\\ud800"', "[1]", "1" * 500, '"' + "y" * 3000 + '"']
    bodies += [f'{{"prompt":"The cat","{name}":{value}}}' for name in names for value in values]
    server.ready()
    before = [replica["restarts"] for replica in server.health()["replicas"]]
    statuses = set()
    for body in bodies:
        response = server.client.post(
            "/v1/completions", content=body.encode("latin-1"), headers={"Content-Type": "application/json"}
        )
        statuses.add(response.status_code)
        assert response.status_code in (200, 400, 404), (body[:200], response.text)
        assert len(response.content) < 2500
        response.json()
    assert statuses == {200, 400, 404}
    for path in ("/v1/" + "x" * 5000, "/v1/%ed%a0%80", "/%00"):
        response = server.client.get(path)
        assert response.status_code == 404
        assert len(response.json()["error"]["message"]) < 400
    for header in ({"Authorization": "Bearer \udcff"}, {"X-Odd": "\udcff"}):
        sent = {name: value.encode("utf-8", "surrogateescape") for name, value in header.items()}
        assert server.client.get("/v1/models", headers=sent).status_code == 200
    assert [replica["restarts"] for replica in server.health()["replicas"]] == before
    assert server.health()["status"] == "ok"
