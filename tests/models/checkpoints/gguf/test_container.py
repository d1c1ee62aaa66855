"""The container: what is written is read; damage and hostile lengths are refused by name, before they cost memory."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
import torch

import mambakit
from mambakit import CheckpointError
from mambakit.models.checkpoints import describe
from mambakit.models.checkpoints.gguf import types
from mambakit.models.checkpoints.gguf.container import Typed, read_header, write_file
from tests.models.tiny import save_tiny

VALUES = {
    "general.architecture": "mamba", "a.flag": True, "a.number": 7, "a.real": 0.5, "a.signed": Typed("q", -3),
    "a.list": [1, 2, 3], "a.texts": ["x", "", "日本"], "a.reals": [0.25], "a.nothing": [],
}  # fmt: skip


def write(path: Path, values=VALUES) -> bytes:
    raw = bytes(range(12))
    write_file(path, values, {"t": ((3, 1), types.F32, lambda: raw), "u": ((2, 3), types.F16, lambda: raw)})
    return raw


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> bytes:
    """The bytes of a small model's file."""
    folder = tmp_path_factory.mktemp("gguf")
    save_tiny(folder / "m", hidden_size=32)
    mambakit.AutoModelForCausalLM.from_pretrained(folder / "m").save_gguf(
        folder / "m.gguf", "Q8_0", mambakit.AutoTokenizer.from_pretrained(folder / "m")
    )
    return (folder / "m.gguf").read_bytes()


def test_what_is_written_is_read(tmp_path):
    raw = write(tmp_path / "a.gguf")
    header = read_header(tmp_path / "a.gguf")
    assert header.metadata == {**VALUES, "a.signed": -3}
    assert {name: (place.shape, place.type.name) for name, place in header.tensors.items()} == {
        "t": ((3, 1), "F32"), "u": ((2, 3), "F16"),
    }  # fmt: skip
    for name in "tu":
        assert header.bytes_of(name).tobytes() == raw
        assert header.tensors[name].start % 32 == 0


def test_a_file_that_changed_is_read_again(tmp_path):
    write(tmp_path / "a.gguf")
    assert read_header(tmp_path / "a.gguf").metadata["a.number"] == 7
    write(tmp_path / "a.gguf", {**VALUES, "a.number": 123456789, "a.more": 1})
    assert read_header(tmp_path / "a.gguf").metadata["a.number"] == 123456789


def _header(*parts: bytes, version: int = 3, tensors: int = 0, values: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + b"".join(parts)


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _tensor(name: bytes, shape: tuple[int, ...], type: int, offset: int) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type, offset)


HUGE = (1 << 63) - 1
HOSTILE = {
    "no magic": (b"GGML" + bytes(40), "no GGUF file"),
    "another version": (_header(version=1), "version 1; mambakit reads 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "more tensors than bytes": (_header(tensors=HUGE), "are left"),
    "more values than bytes": (_header(values=HUGE), "are left"),
    "a key without end": (_header(struct.pack("<Q", 1 << 40), bytes(20), values=1), "a key at byte 32 has"),
    "a key that is no text": (_header(_text(b"\xff\xfe"), bytes(20), values=1), "not UTF-8"),
    "a text without end": (_header(_text(b"k"), struct.pack("<IQ", 8, HUGE), values=1), "would take"),
    "an array without end": (_header(_text(b"k"), struct.pack("<IIQ", 9, 4, HUGE), values=1), "would take"),
    "texts without end": (_header(_text(b"k"), struct.pack("<IIQ", 9, 8, HUGE), values=1), "would take"),
    "an array of arrays": (_header(_text(b"k"), struct.pack("<IIQ", 9, 9, 1), bytes(20), values=1), "array of type 9"),
    "an unknown type of value": (_header(_text(b"k"), struct.pack("<I", 99), bytes(8), values=1), "unknown type 99"),
    "a key twice": (_header(*2 * [_text(b"k") + struct.pack("<II", 4, 1)], values=2), "'k' twice"),
    "a tensor twice": (_header(*2 * [_tensor(b"t", (1,), 0, 0)], bytes(64), tensors=2), "tensor 't' twice"),
    "five dimensions": (_header(_tensor(b"t", (1,) * 5, 0, 0), bytes(64), tensors=1), "has 5 dimensions"),
    "a product that overflows": (_header(_tensor(b"t", (1 << 40, 1 << 40), 0, 0), bytes(64), tensors=1), "has shape"),
    "past the end": (_header(_tensor(b"t", (64,), 0, 0), bytes(64), tensors=1), "ends at byte"),
    "an offset past the end": (_header(_tensor(b"t", (1,), 0, 1 << 62), bytes(64), tensors=1), "ends at byte"),
    "an unaligned offset": (_header(_tensor(b"t", (1,), 0, 4), bytes(64), tensors=1), "no multiple of 32"),
    "an unknown type": (_header(_tensor(b"t", (1,), 77, 0), bytes(64), tensors=1), "type 77; mambakit reads F32"),
    "half a block": (_header(_tensor(b"t", (33,), 8, 0), bytes(64), tensors=1), "rows of 33 numbers"),
    "an alignment of 0": (
        _header(_text(b"general.alignment") + struct.pack("<II", 4, 0), values=1), "alignment is 0",
    ),
    "another architecture": (
        _header(_text(b"general.architecture") + struct.pack("<I", 8) + _text(b"llama"), values=1), "loads 'mamba'",
    ),
    "no architecture": (_header(), "config.json|architecture|model_type"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_by_name(case, tmp_path):
    content, message = HOSTILE[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        describe(path)
    assert "m.gguf" in str(caught.value)


def test_a_file_that_ends_early(model, tmp_path):
    path = tmp_path / "m.gguf"
    choice = random.Random(0)
    for keep in [0, 1, 4, 8, 23, 24, 25, len(model) - 1, *(choice.randrange(len(model)) for _ in range(60))]:
        path.write_bytes(model[:keep])
        with pytest.raises(CheckpointError, match="m.gguf"):
            mambakit.AutoModelForCausalLM.from_pretrained(path)


def test_bytes_overwritten(model, tmp_path):
    """Whatever the damage to the header, it is read or refused by name: no other exception gets out."""
    path, choice, refused = tmp_path / "m.gguf", random.Random(0), 0
    place = min(tensor.start for tensor in _places(model, path))
    for _ in range(150):
        damaged = bytearray(model)
        for _ in range(choice.choice([1, 1, 3, 20])):
            damaged[choice.randrange(place if choice.random() < 0.5 else 3000)] = choice.randrange(256)
        path.write_bytes(damaged)
        for read in (describe, mambakit.AutoTokenizer.from_pretrained, mambakit.AutoModelForCausalLM.from_pretrained):
            try:
                read(path)
                message = ""
            except CheckpointError as error:
                message = str(error)
            refused += bool(message)
            assert not message or "m.gguf" in message
    assert refused > 100


def _places(content: bytes, path: Path):
    path.write_bytes(content)
    return read_header(path).tensors.values()


def test_an_a_that_is_not_negative(model, tmp_path):
    path = tmp_path / "m.gguf"
    _places(model, path)
    start = read_header(path).tensors["blk.1.ssm_a"].start
    content = bytearray(model)
    content[start : start + 4] = struct.pack("<f", 0.25)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ssm_a has 0.25; Mamba's A is below 0"):
        mambakit.AutoModelForCausalLM.from_pretrained(path)


def test_weights_are_private_to_the_process(model, tmp_path):
    """A step of training does not write into the file that is mapped."""
    path = tmp_path / "m.gguf"
    path.write_bytes(model)
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert path.read_bytes() == model
