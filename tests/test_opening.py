"""Data files of every compression, whole and damaged; JSON lines."""

from __future__ import annotations

import bz2
import gzip
import lzma
import wave
from pathlib import Path

import pytest

from mambakit.errors import UsageError
from mambakit.opening import COMPRESSED, named_damage, open_binary, open_text, read_json_lines
from mambakit.training.data.audio import wav_rate

TEXT = "eins\r\nzwei — naïve\n" * 5000


def zst(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.compress(data, codec="zstd", asbytes=True)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


def test_every_suffix_is_tested():
    assert set(COMPRESS) == {"", *COMPRESSED}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text(suffix, tmp_path):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXT.encode()))
    with open_text(path, newline="") as file:
        assert file.read() == TEXT
    with open_text(path) as file:
        assert "".join(file) == TEXT.replace("\r\n", "\n")
    with open_binary(path) as binary:
        assert binary.read(6) == b"eins\r\n"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_sound(suffix, tmp_path):
    """wave asks whether it can seek."""
    plain, path = tmp_path / "a.wav", tmp_path / f"b.wav{suffix}"
    with wave.open(str(plain), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(2000))
    path.write_bytes(COMPRESS[suffix](plain.read_bytes()))
    assert wav_rate(path) == 8000


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("damage", ["cut", "not compressed", "not UTF-8"])
def test_damage_is_named(suffix, damage, tmp_path):
    path = tmp_path / f"a.txt{suffix}"
    whole = COMPRESS[suffix](b"\xff\xfe" if damage == "not UTF-8" else TEXT.encode())
    path.write_bytes({"cut": whole[: len(whole) // 2], "not compressed": TEXT.encode()}.get(damage, whole))
    with pytest.raises(UsageError, match="here: "), named_damage("here"), open_text(path) as file:
        file.read()


def test_the_systems_errors_are_not_damage(tmp_path):
    with pytest.raises(IsADirectoryError), named_damage("here"), open_text(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), named_damage("here"), open_text(tmp_path / "a.zst"):
        pass


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n \n{"b": "\\u2028"}\n')
    assert list(read_json_lines(path)) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 3", {"b": "\u2028"})]
    for line, says in (("{", "not a JSON object"), ("[1]", "not a JSON object, but a list"), ("[" * 100_000, "not a")):
        path.write_text(f'{{"a": 1}}\n{line}\n')
        with pytest.raises(UsageError, match=f"line 2: {says}"):
            list(read_json_lines(path))


def test_only_one_module_opens_compressed_files():
    package = Path(__file__).resolve().parents[1] / "mambakit"
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if any(f"import {name}" in path.read_text(encoding="utf-8") for name in ("gzip", "bz2", "lzma"))
    }
    assert users == {"opening.py"}
