"""API keys: where they come from, what is kept of them, and what each of them may use.

Only SHA-256 digests are kept. A key is random and long, so that its digest, which a file of keys may hold in its
place, cannot be turned back into it.
"""

from __future__ import annotations

import datetime
import difflib
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mambakit.quoting import cut, quoted
from mambakit.toml_files import read_toml

LEAST_KEY = 16
KEY_VARIABLE = "MAMBAKIT_API_KEY"
_MOST = (1 << 53) - 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class Quota:
    """What one key may use; None is no limit.

    Attributes:
        texts: that are being written or wait, at once.
        requests_per_minute: on average over a minute, with bursts of as many.
        tokens_per_minute: of prompts and of texts. A request is counted with its ``max_tokens`` until it has ended,
            and then with what it used.
    """

    texts: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True)
class Key:
    """
    Attributes:
        name: in logs and metrics.
        digest: SHA-256 of the key.
        expires: from then on it is refused; None: never.
    """

    name: str
    digest: bytes
    quota: Quota = field(default_factory=Quota)
    expires: datetime.datetime | None = None

    @classmethod
    def of(cls, key: str) -> Key:
        """A key without limits, named by the beginning of its digest."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        return cls(f"key-{digest.hex()[:8]}", digest)

    @property
    def expired(self) -> bool:
        return self.expires is not None and datetime.datetime.now(datetime.timezone.utc) >= self.expires


class Keys:
    """The keys of a server, which may be replaced while it runs. Without any, none is required."""

    def __init__(self, keys: Iterable[Key] = ()):
        self.all: tuple[Key, ...] = tuple(keys)

    @classmethod
    def of(cls, *keys: str) -> Keys:
        return cls(Key.of(key) for key in dict.fromkeys(keys))

    def __bool__(self) -> bool:
        return bool(self.all)

    def __iter__(self) -> Iterator[Key]:
        return iter(self.all)

    def replace(self, keys: Keys) -> None:
        self.all = keys.all

    def find(self, authorization: str) -> Key | None:
        """The key that a header holds. Takes constant time for any wrong key."""
        kind, _, sent = authorization.partition(" ")
        digest = hashlib.sha256(sent.strip().encode("utf-8", "surrogatepass")).digest()
        # Every key is compared, whether or not an earlier one was equal.
        equal = [key for key in self.all if hmac.compare_digest(digest, key.digest)]
        return equal[0] if equal and kind.lower() == "bearer" and not equal[0].expired else None


def read_keys(given: Iterable[str] | None, file: str | None, environment: Mapping[str, str]) -> Keys:
    """The keys of --api-key and --api-key-file, else that of the environment.

    Args:
        file: with a key on each line, or TOML with a table ``[[keys]]`` for each: `Key`'s and `Quota`'s fields, with
            ``sha256`` for the digest.

    Raises:
        ValueError: a key cannot be sent in a header, or is too short; or the file is wrong.
    """
    found = [("--api-key", key) for key in given or ()]
    hashed: list[Key] = []
    if file is not None:
        if Path(file).suffix == ".toml":
            hashed = _read_tables(file)
        else:
            found += _read_lines(file)
    if not found and not hashed and KEY_VARIABLE in environment:
        found = [(KEY_VARIABLE, environment[KEY_VARIABLE])]
    for source, key in found:
        _check_key(source, key)
    plain = Keys.of(*(key for _, key in found)).all
    return Keys([*plain, *(key for key in hashed if key.digest not in {one.digest for one in plain})])


def _check_key(source: str, key: str) -> None:
    """The message never shows the key: it goes to logs."""
    remedy = "make one with mambakit serve --make-key NAME"
    if not key.strip():
        raise ValueError(
            f"{source}: the key is {'blank' if key else 'empty'}, as an unset variable is; leave "
            f"{source.split(',')[0]} out to serve without a key, or {remedy}"
        )
    if key != key.strip():
        raise ValueError(f"{source}: the key begins or ends with a blank or a line end; take it away")
    bad = next((i for i, character in enumerate(key) if not "!" <= character <= "~"), None)
    if bad is not None:
        raise ValueError(
            f"{source}: character {bad + 1} of the key (U+{ord(key[bad]):04X}) cannot be sent in a header; use visible "
            f"ASCII without blanks, or {remedy}"
        )
    if len(key) < LEAST_KEY:
        raise ValueError(
            f"{source}: the key has {len(key)} characters; at least {LEAST_KEY} keep it from being guessed: {remedy}"
        )


def make_key(name: str) -> tuple[str, str]:
    """(a new key, its table for a file of keys). Raises a ValueError for a name that no key can have."""
    key = f"mk-{secrets.token_urlsafe(32)}"
    _check_name("--make-key", name)
    return key, f'[[keys]]\nname = "{name}"\nsha256 = "{Key.of(key).digest.hex()}"\n'


# -- the file ----------------------------------------------------------------------------------------------------------

_QUOTA = tuple(one.name for one in fields(Quota))
_FIELDS = ("name", "sha256", *_QUOTA, "expires")


def _read_lines(file: str) -> list[tuple[str, str]]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--api-key-file {file} cannot be read ({error}); name a file with a key on each line"
        ) from None
    if not any(lines):
        raise ValueError(f"--api-key-file {file} holds no key; write one on each line")
    return [(f"--api-key-file {file}, line {i}", line) for i, line in enumerate(lines, 1) if line]


def _read_tables(file: str) -> list[Key]:
    where = f"--api-key-file {file}"
    content = read_toml(file, "--api-key-file")
    tables = content.get("keys")
    if set(content) != {"keys"} or not isinstance(tables, list) or not tables:
        raise ValueError(f"{where} has {', '.join(map(quoted, content)) or 'nothing'}; write a table [[keys]] for each")
    keys = [_read_key(f"{where}, key {number}", table) for number, table in enumerate(tables, 1)]
    for what, values in (("name", [key.name for key in keys]), ("sha256", [key.digest.hex() for key in keys])):
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"{where}: two keys have the {what} {twice}; give each its own")
    return keys


def _read_key(where: str, table: Any) -> Key:
    if not isinstance(table, dict):
        raise ValueError(f"{where} is {quoted(table)}; write a table [[keys]]")
    for name in table:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_FIELDS)}"
            raise ValueError(f"{where}: there is no field {quoted(name)}; {hint}")
    _check_name(f"{where}: name", table.get("name"))
    digest = table.get("sha256")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        # What stands there may be the key itself: it is not shown.
        raise ValueError(
            f"{where} ({table['name']}): sha256 is not 64 hexadecimal digits; `mambakit serve --make-key NAME` prints "
            "a key and its table"
        )
    limits = {name: _limit(f"{where} ({table['name']}): {name}", table[name]) for name in _QUOTA if name in table}
    return Key(table["name"], bytes.fromhex(digest), Quota(**limits), _expiry(where, table.get("expires")))


def _check_name(where: str, name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{where} is {quoted(name)}; a key's name has up to 64 letters, digits and . _ - @, a letter or digit first"
        )


def _limit(where: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MOST:
        raise ValueError(f"{where} is {quoted(value)}; it must be a whole number, 1 or more: leave it out for no limit")
    return value


def _expiry(where: str, value: Any) -> datetime.datetime | None:
    if value is None:
        return None
    if isinstance(value, datetime.datetime):
        return value if value.tzinfo else value.replace(tzinfo=datetime.timezone.utc)
    if isinstance(value, datetime.date):  # it serves until that day begins
        return datetime.datetime(value.year, value.month, value.day, tzinfo=datetime.timezone.utc)
    raise ValueError(f"{where}: expires is {cut(str(value))}; it must be a TOML date, as 2027-01-31")
