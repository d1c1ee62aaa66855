"""Keys from a TOML file: hashed, with limits, and read again."""

from __future__ import annotations

import datetime
import hashlib
import json
from dataclasses import replace

import pytest

from mambakit import cli
from mambakit.serving.errors import ApiError
from mambakit.serving.http.access import AccessRules
from mambakit.serving.http.keys import Key, Keys, Quota, make_key, read_keys

KEY = "sixteen-visible-characters"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()


def table(**fields: object) -> str:
    def spelled(value: object) -> str:
        return value.isoformat() if isinstance(value, datetime.date) else json.dumps(value)

    values = {"name": "a", "sha256": DIGEST} | fields
    return "[[keys]]\n" + "".join(f"{name} = {spelled(value)}\n" for name, value in values.items())


def test_a_hashed_key_is_found_with_its_limits(tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(table(texts=2, requests_per_minute=60, tokens_per_minute=1000, expires=datetime.date(2999, 1, 1)))
    keys = read_keys(None, str(file), {})
    found = keys.find(f"Bearer {KEY}")
    assert found is not None
    assert (found.name, found.quota) == ("a", Quota(2, 60, 1000))
    assert found.expires == datetime.datetime(2999, 1, 1, tzinfo=datetime.timezone.utc)
    assert keys.find(f"Bearer {DIGEST}") is None, "the digest is no key"
    assert KEY not in repr(found)


def test_an_expired_key_is_refused(tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(table(expires=datetime.date(2020, 1, 1)))
    rules = AccessRules(keys=read_keys(None, str(file), {}))
    with pytest.raises(ApiError, match="expired"):
        rules.require_key(f"Bearer {KEY}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has nothing; write a table"),
        ("keys = 3\n", "write a table"),
        ("other = 1\n", '"other"'),
        ("[[keys]\n", "not valid TOML"),
        ("keys = [3]\n", "key 1 is 3"),
        (table(sha256=KEY), "not 64 hexadecimal"),
        (table(sha256=3), "not 64 hexadecimal"),
        (table(name=""), 'name is ""'),
        (table(name="two words"), "letters, digits"),
        (table(texts=0), "texts is 0; it must be a whole number"),
        (table(texts=True), "texts is true"),
        (table(tokens_per_minute=1.5), "tokens_per_minute is 1.5"),
        (table(expires=7), "expires is 7; it must be a TOML date"),
        (table(request_per_minute=1), "did you mean requests_per_minute?"),
        (table() + table(), "two keys have the name a"),
        (table() + table(name="b"), "two keys have the sha256"),
    ],
)
def test_a_wrong_file_is_refused_by_name(text, says, tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match="keys.toml") as caught:
        read_keys(None, str(file), {})
    assert says in str(caught.value)
    assert KEY not in str(caught.value), "what stands in the place of a digest may be the key"


def test_a_made_key_opens_with_its_table(tmp_path, capsys):
    assert cli.main(["serve", "--make-key", "team-a"]) == 0
    key, _, text = capsys.readouterr().out.partition("\n")
    file = tmp_path / "keys.toml"
    file.write_text(text)
    found = read_keys(None, str(file), {}).find(f"Bearer {key}")
    assert found is not None
    assert found.name == "team-a"
    assert make_key("x")[0] != make_key("x")[0]
    assert cli.main(["serve", "--make-key", "no name"]) == 2
    assert "--make-key is" in capsys.readouterr().err


def test_keys_are_replaced_in_place():
    rules = AccessRules(keys=Keys.of(KEY))
    copy = replace(rules, loopback=False)
    rules.keys.replace(Keys([Key("b", hashlib.sha256(b"another").digest())]))
    with pytest.raises(ApiError):
        copy.require_key(f"Bearer {KEY}")
