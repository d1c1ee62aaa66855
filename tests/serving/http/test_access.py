"""Keys, hosts and origins."""

from __future__ import annotations

import logging

import pytest

from mambakit import cli
from mambakit.serving.errors import ApiError
from mambakit.serving.http.access import AccessRules, check_hosts, check_origins, is_loopback
from mambakit.serving.http.keys import Keys, read_keys
from tests.serving.api_server import api_server

KEY, OTHER = "sixteen-visible-characters", "another-key-of-mine"
BAD_KEYS = {
    "": "the key is empty, as an unset variable is",
    "   ": "the key is blank",
    "\n": "the key is blank",
    KEY + "\n": "begins or ends with a blank or a line end",
    " " + KEY: "begins or ends with a blank",
    KEY + "\r\nX: y": "cannot be sent in a header",
    KEY + " " + KEY: r"\(U\+0020\) cannot be sent",
    KEY + "\x7f": r"\(U\+007F\) cannot be sent",
    KEY + "\x00": r"\(U\+0000\) cannot be sent",
    "schlüssel-der-länge-20": r"\(U\+00FC\) cannot be sent",
    "ключ-достаточной-длины": "cannot be sent",
    "\ud800" + KEY: "cannot be sent",
    "x" * 15: "the key has 15 characters; at least 16",
}


@pytest.mark.parametrize("key", BAD_KEYS)
def test_keys_that_are_none_are_refused_wherever_they_come_from(key, tmp_path):
    with pytest.raises(ValueError, match=rf"--api-key: .*{BAD_KEYS[key]}") as caught:
        read_keys([KEY, key], None, {})
    assert KEY not in str(caught.value)
    with pytest.raises(ValueError, match=f"MAMBAKIT_API_KEY: .*{BAD_KEYS[key]}"):
        read_keys(None, None, {"MAMBAKIT_API_KEY": key})
    if key.strip() and key.isprintable():
        file = tmp_path / "keys"
        file.write_text(f"{KEY}\n{key}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=f"keys, line 2: .*{BAD_KEYS[key]}"):
            read_keys(None, str(file), {})


def test_where_keys_come_from(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{OTHER}\r\n\r\n{KEY}\r\n")
    assert read_keys(None, None, {}).all == ()
    assert read_keys(None, None, {"MAMBAKIT_API_KEY": KEY}).all == Keys.of(KEY).all
    assert read_keys([KEY], str(file), {"MAMBAKIT_API_KEY": "x"}).all == Keys.of(KEY, OTHER).all
    file.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_keys(None, str(file), {})
    file.write_bytes(b"\xff\xfe\x00")
    for name in (file, tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"--api-key-file .* cannot be read"):
            read_keys(None, str(name), {})


def test_the_command_refuses_them(monkeypatch, capsys):
    monkeypatch.setenv("MAMBAKIT_API_KEY", KEY)
    for options in (
        ["--api-key", ""],
        ["--api-key-file", ""],
        ["--allowed-host", ""],
        ["--allowed-origin", ""],
        ["--host", ""],
    ):
        assert cli.main(["serve", *options]) == 2
        assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sent", "known"),
    [
        (f"Bearer {KEY}", True), (f"bearer {OTHER}", True), (f"Bearer  {KEY}", True),
        ("", False), (KEY, False), ("Bearer", False), ("Bearer ", False), (f"Basic {KEY}", False),
        (f"Bearer {KEY}x", False), (f"Bearer {KEY[:-1]}", False), (f"Bearer {KEY},{OTHER}", False),
        ("Bearer \xff\xfe", False),
    ],
)  # fmt: skip
def test_keys_are_compared_whole(sent, known):
    rules = AccessRules(keys=Keys.of(KEY, OTHER))
    if known:
        rules.require_key(sent)
    else:
        with pytest.raises(ApiError, match="missing, wrong or expired"):
            rules.require_key(sent)
    AccessRules().require_key(sent)


def test_a_key_is_one_owner_however_it_is_written():
    rules = AccessRules(keys=Keys.of(KEY, OTHER))
    names = [rules.require_key(f"{kind} {KEY}").name for kind in ("Bearer", "bearer", "BEARER ", "Bearer  ")]
    assert len(set(names)) == 1
    assert names[0] != rules.require_key(f"Bearer {OTHER}").name
    assert KEY not in names[0]
    assert AccessRules().require_key(f"Bearer {KEY}") is AccessRules().require_key("") is None, (
        "without keys clients could invent some"
    )


LOCAL = ["localhost", "localhost.", "LOCALHOST", "a.localhost", "127.0.0.1", "127.9.8.7", "[::1]", "[::ffff:127.0.0.1]"]
FOREIGN = [
    "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "0.0.0.0", "10.0.0.1", "[::]", "[::2]",
    "2130706433", "127.1", "127.0.0.1.", "0x7f000001",
]  # fmt: skip


def test_names_of_a_server_on_loopback():
    rules = AccessRules()
    assert [host for host in LOCAL if not rules.allows_host(host)] == []
    assert [host for host in FOREIGN if rules.allows_host(host)] in ([], ["127.0.0.1."])
    named = AccessRules(hosts=check_hosts(["Models.Example.", "10.0.0.1"]), keys=Keys.of(KEY))
    assert named.allows_host("models.example")
    assert named.allows_host("10.0.0.1")
    assert not named.allows_host("evil.example")
    assert AccessRules(hosts=check_hosts(["*"])).allows_host("evil.example")


def test_names_of_a_public_server():
    without, with_key = AccessRules(loopback=False), AccessRules(loopback=False, keys=Keys.of(KEY))
    for host in ("10.0.0.1", "[2001:db8::1]", "localhost"):
        assert without.allows_host(host)
        assert with_key.allows_host(host)
    assert not without.allows_host("evil.example"), "a page may have pointed its name here"
    assert with_key.allows_host("models.example"), "a page does not know the key"
    assert not AccessRules(loopback=False, keys=Keys.of(KEY), hosts=("models.example",)).allows_host("evil.example")


def test_what_is_allowed_is_named_as_it_is_compared():
    for host in ("", "http://a", "a:80", "*.example", "a/b", "a b"):
        with pytest.raises(ValueError, match="--allowed-host"):
            check_hosts([host])
    for origin in ("", "example.org", "https://example.org/", "https://*", "https://", "null"):
        with pytest.raises(ValueError, match="--allowed-origin"):
            check_origins([origin])
    assert check_origins(["https://Example.org:8443", "*"]) == ("https://example.org:8443", "*")


def test_addresses():
    assert [a for a in ("127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1") if not is_loopback(a)] == []
    assert [a for a in ("0.0.0.0", "::", "10.0.0.1", "fe80::1%eth0", "") if is_loopback(a)] == []


@pytest.fixture(scope="module")
def local():
    with api_server(access=AccessRules(keys=Keys.of(KEY), origins=("https://pages.example",))) as one:
        yield one


REFUSED = {
    "a name that was pointed here": {"Host": "evil.example:8000"},
    "a name like ours": {"Host": "localhost.evil.example"},
    "any address": {"Host": "0.0.0.0:8000"},
    "another page": {"Origin": "https://evil.example"},
    "a page of another port": {"Origin": "http://localhost:9"},
    "a page of nowhere": {"Origin": "null"},
    "an allowed page's child": {"Origin": "https://pages.example.evil.example"},
    "a picture's address": {"Sec_Fetch_Site": "cross-site"},
    "a sibling's picture": {"Sec_Fetch_Site": "same-site"},
}


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/completions", "/nowhere"])
@pytest.mark.parametrize("what", REFUSED)
def test_pages_do_not_reach_it(local, what, path):
    method = "POST" if path == "/v1/completions" else "GET"
    request = (
        local.head(method, path, **REFUSED[what], Authorization=f"Bearer {KEY}", Connection="close", Content_Length=2)
        + b"{}"
    )
    status, received = local.ask(request)
    assert status == 403
    assert b"_not_allowed" in received
    assert local.ask(local.head("OPTIONS", path, **REFUSED[what], Connection="close"))[0] in (403, 405)


@pytest.mark.parametrize("host", ["a b", "a@b", "a:b", "a:80:90", "[::1", "", "a/b", "ä"])
def test_hosts_that_are_none(local, host):
    assert local.ask(local.head("GET", "/health", Host=host, Connection="close"))[0] == 400


def test_who_does_reach_it(local):
    for headers in (
        {}, {"Host": "localhost"}, {"Host": "[::1]:80"}, {"Origin": f"http://{local.host}"}, {"Origin": "https://pages.example"},
        {"Sec_Fetch_Site": "none"}, {"Sec_Fetch_Site": "same-origin"},
        {"Origin": "https://pages.example", "Sec_Fetch_Site": "cross-site"},
    ):  # fmt: skip
        assert local.ask(local.head("GET", "/health", Connection="close", **headers))[0] == 200, headers
    asks = {
        "Origin": "https://pages.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    status, received = local.ask(local.head("OPTIONS", Connection="close", **asks))
    assert status == 200
    assert b"access-control-allow-origin: https://pages.example" in received


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200), ("Application/JSON; charset=utf-8", 200), (None, 400), ("text/plain", 415),
        ("", 415), ("application/x-www-form-urlencoded", 415), ("multipart/form-data; boundary=x", 415),
        ("text/plain;application/json", 415), ("application/jsonp", 415),
    ],
)  # fmt: skip
def test_a_form_is_not_a_request(local, kind, status):
    body = b'{"prompt": "a", "max_tokens": 1}'
    headers = {"Content_Type": kind, "Content-Type": None, "Authorization": f"Bearer {KEY}", "Connection": "close"}
    assert local.ask(local.head(Content_Length=len(body), **headers | {"Content-Type": kind}) + body)[0] == status
    assert local.ask(local.head(Content_Length=len(body), Content_Encoding="gzip", **headers) + body)[0] in (400, 415)


def test_a_key_is_asked_for_before_the_body(local):
    with local.connect() as client:
        client.sendall(local.head(Content_Length=1000, Connection="close"))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 401")
    assert local.ask(local.head("GET", "/v1/models", Connection="close"))[0] == 401
    assert local.ask(local.head("GET", "/v1/models", Connection="close", Authorization=f"Bearer {KEY}"))[0] == 200


@pytest.mark.parametrize("keys", [(), (KEY,)])
def test_a_public_address_without_a_key_warns(keys, caplog):
    with caplog.at_level(logging.WARNING), api_server(host="0.0.0.0", access=AccessRules(keys=Keys.of(*keys))):
        assert ("everybody there may use this server" in caplog.text) == (not keys)
