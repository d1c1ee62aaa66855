"""Small data files in the experiments' formats, and a folder of results."""

from __future__ import annotations

import gzip
import lzma
import random

import numpy as np
import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "away", "home"]
    for name, documents in (("books", 3), ("books_heldout", 1)):
        texts = [" ".join(generator.choices(words, k=1500)) + ".\n" for _ in range(documents)]
        with lzma.open(folder / f"{name}.txt.xz", "wt", encoding="utf-8") as file:
            file.write("<|endoftext|>\n".join(texts))
    (folder / "dna").mkdir()
    for path, opener in (("klebsiella_mgh78578.fna.xz", lzma.open), ("ecoli_536.fna.gz", gzip.open)):
        with opener(folder / "dna" / path, "wt", encoding="ascii") as file:
            for record in range(2):
                # Codons of a small set: an order-2 Markov model gains on uniform.
                letters = "".join(generator.choices(["ATG", "GCC", "AAA", "TTT"], k=700))
                file.write(f">record {record}\n{letters[:1000]}\n{letters[1000:]}\n")
    (folder / "audio").mkdir()
    noise = np.random.default_rng(0)
    codes, lengths, digits, index = [], [], [], []
    for digit in range(10):
        for number in range(8):  # a digit is a tone: learnable in a few steps
            length = int(noise.integers(180, 256))
            tone = np.sin(2 * np.pi * np.arange(length) * 2 ** (digit / 2) / 64)
            codes.append(np.clip(128 + 100 * tone + noise.normal(0, 2, length), 0, 255).astype(np.uint8))
            lengths.append(length)
            digits.append(digit)
            index.append(number)
    np.savez(
        folder / "audio" / "speech_digits.npz",
        codes=np.concatenate(codes),
        offsets=np.cumsum([0, *lengths]),
        digit=np.array(digits, np.int8),
        index=np.array(index),
    )
    return folder


@pytest.fixture
def common(data, tmp_path):
    """Flags of every experiment's tiny run."""
    return ["--data", str(data), "--out", str(tmp_path), "--device", "cpu"]
