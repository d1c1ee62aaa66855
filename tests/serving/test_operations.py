"""What those who run a server rely on: probes, logs, limits of keys, TLS, and files that are read again on SIGHUP."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import ssl

import httpx
import pytest
import trustme

from mambakit.serving.http.access import AccessRules
from mambakit.serving.http.keys import Key, Keys, Quota
from mambakit.serving.http.tls import TlsOptions, make_context
from mambakit.serving.logs import FIELDS, LogOptions
from tests.serving.api_server import ApiServer, api_server
from tests.serving.conftest import serving, wait_until

KEY, OTHER = "sixteen-visible-characters", "another-key-of-mine"
SECRET = "prompts are nobody's business"


def client_of(one: ApiServer, key: str = "", **options) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=f"http://{one.host}", headers=headers, timeout=20, **options)


def lines_of(caplog) -> list[dict]:
    return [getattr(record, FIELDS) for record in caplog.records if record.name == "mambakit.requests"]


@pytest.mark.parametrize("name", ["livez", "readyz", "live", "ready"])
def test_probes(name):
    with api_server() as one, client_of(one) as client:
        assert client.get(f"/{name}").json() == {"status": "ok"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_one_line_without_its_prompt(stream, caplog):
    keys = Keys([Key("team-a", hashlib.sha256(KEY.encode()).digest())])
    with (
        caplog.at_level(logging.INFO),
        api_server(access=AccessRules(keys=keys)) as one,
        client_of(one, KEY) as client,
    ):
        body = {"prompt": SECRET, "max_tokens": 3, "stream": stream}
        answer = client.post("/v1/completions", json=body, headers={"X-Request-Id": "mine-1"})
        assert answer.headers["X-Request-Id"] == "mine-1"
        wait_until(lambda: lines_of(caplog), "the line is written")
        client.post("/v1/completions", json={"prompt": SECRET, "max_tokens": "many"})
        client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {OTHER}"})
        client.get("/no/such/path?" + SECRET)
        client.get("/livez")
        wait_until(lambda: len(lines_of(caplog)) >= 4, "all lines are written")
    first, wrong, refused, missing = lines_of(caplog)
    assert (first["request_id"], first["status"], first["key"]) == ("mine-1", 200, "team-a")
    assert (first["prompt_tokens"], first["tokens"], first["texts"]) == (len(SECRET), 3, 1)
    assert (wrong["status"], refused["status"], missing["status"]) == (400, 401, 404)
    assert wrong["request_id"].startswith("req")
    assert "key" not in refused
    assert SECRET not in caplog.text + json.dumps(lines_of(caplog))
    assert KEY not in caplog.text + json.dumps(lines_of(caplog))


def test_prompts_are_logged_where_that_was_asked(caplog):
    with caplog.at_level(logging.INFO), api_server(logs=LogOptions(prompts=True)) as one, client_of(one) as client:
        client.post("/v1/completions", json={"prompt": [SECRET, "x"], "max_tokens": 1})
        wait_until(lambda: lines_of(caplog), "the line is written")
    assert lines_of(caplog)[0]["prompts"] == [SECRET, "x"]


def test_a_key_has_its_limits():
    digest = hashlib.sha256(KEY.encode()).digest()
    few = Key("team-b", hashlib.sha256(OTHER.encode()).digest(), Quota(texts=2))
    keys = Keys([Key("team-a", digest, Quota(texts=2, tokens_per_minute=100)), few])
    with (
        api_server(access=AccessRules(keys=keys)) as one,
        client_of(one, KEY) as client,
        client_of(one, OTHER) as other,
    ):
        body = {"prompt": "a", "max_tokens": 9}
        assert client.post("/v1/completions", json=body | {"n": 2}).status_code == 200  # 19 of 100
        many = client.post("/v1/completions", json=body | {"n": 3})
        assert (many.status_code, many.headers.get("Retry-After")) == (429, None)
        assert client.post("/v1/completions", json=body | {"max_tokens": 80}).status_code == 200
        full = client.post("/v1/completions", json=body | {"max_tokens": 59})
        assert full.status_code == 429
        assert 30 <= int(full.headers["Retry-After"]) <= 36
        assert "100 tokens a minute" in full.json()["error"]["message"]
        assert other.post("/v1/completions", json=body | {"max_tokens": 59}).status_code == 200
        one.replicas.seconds = 0.05
        with other.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            busy = client_of(one, OTHER).post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "n": 2})
            assert "at once" in busy.json()["error"]["message"]
            stream.read()


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


def write_certificate(authority, folder, name="localhost"):
    issued = authority.issue_cert(name, "127.0.0.1")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(folder / "cert.pem", append=number > 0)
    return TlsOptions(str(folder / "cert.pem"), str(folder / "key.pem"))


def trusting(authority, identity=None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if identity is not None:
        identity.configure_cert(context)
    return context


def test_https_and_certificates_of_clients(authority, tmp_path):
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    options = write_certificate(authority, tmp_path)
    mutual = TlsOptions(options.certificate, options.key, client_ca=str(tmp_path / "ca.pem"))
    for tls, identity, fits in (
        (options, None, True),
        (mutual, None, False),
        (mutual, authority.issue_cert("someone@example.org"), True),
        (mutual, trustme.CA().issue_cert("someone@example.org"), False),
    ):
        with api_server(tls=tls) as one:
            url = f"https://{one.host}/v1/completions"
            with httpx.Client(verify=trusting(authority, identity), timeout=20) as client:
                body = {"prompt": "a", "max_tokens": 2, "stream": True}
                if fits:
                    answer = client.post(url, json=body, headers={"Origin": f"https://{one.host}"})
                    assert answer.text.endswith("data: [DONE]\n\n")
                    foreign = client.post(url, json=body, headers={"Origin": f"http://{one.host}"})
                    assert foreign.status_code == 403, "a page without TLS is another site"
                else:
                    with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
                        client.post(url, json=body)


@pytest.mark.parametrize("part", ["certificate", "key", "password_file", "client_ca"])
def test_files_that_do_not_serve_are_named(part, authority, tmp_path):
    options = write_certificate(authority, tmp_path)
    for content in (None, b"", b"no PEM"):
        file = tmp_path / "other"
        if content is not None:
            file.write_bytes(content)
        if part == "password_file" and content:
            continue
        with pytest.raises(ValueError, match=r"--tls-\S+ .*other"):
            make_context(TlsOptions(**vars(options) | {part: str(file)}))


def test_a_key_of_another_certificate(authority, tmp_path):
    options = write_certificate(authority, tmp_path)
    (tmp_path / "two").mkdir()
    other = write_certificate(authority, tmp_path / "two")
    with pytest.raises(ValueError, match="--tls-key"):
        make_context(TlsOptions(options.certificate, other.key))


# -- SIGHUP ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_keys_and_certificate_are_read_again(model, authority, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(KEY + "\n")
    tls = write_certificate(authority, tmp_path)
    config = tmp_path / "serve.toml"
    config.write_text(
        f"model = {json.dumps(model)}\napi-key-file = {json.dumps(str(keys))}\nlog-format = 'json'\n"
        f"tls-cert = {json.dumps(tls.certificate)}\ntls-key = {json.dumps(tls.key)}\n"
    )
    log = tmp_path / "log"

    def events(message: str) -> list[dict]:
        found = [json.loads(line) for line in log.read_text().splitlines()]  # every line is one object
        return [line for line in found if message in line["message"]]

    with serving(log, "--config", str(config)) as server:
        assert server.url.startswith("https://127.0.0.1:")

        def status(key: str, trusted=authority) -> int:
            with httpx.Client(verify=trusting(trusted), timeout=20) as client:
                return client.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

        assert (status(KEY), status(OTHER)) == (200, 401)
        keys.write_text("too short\n")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: events("not read again"), "the mistake is told")
        assert "line 1" in events("not read again")[0]["message"]
        assert (status(KEY), status(OTHER)) == (200, 401), "what was there before serves on"

        keys.write_text(OTHER + "\n")
        another = trustme.CA()
        write_certificate(another, tmp_path)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: events("the certificate was read again"), "both are read")
        assert (status(KEY, another), status(OTHER, another)) == (401, 200)
        assert events("keys were read again")[0]["keys"] == 1
        assert server.process.poll() is None
