"""How prompts are cut into chunks: the table of chunk sizes, and prompts of any shape as a sequence of forwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mambakit.decoding.transfers import to_device
from mambakit.quoting import brief

Prompts = Tensor | Sequence[Tensor]
"""(b, l) int64, or b tensors (l_i,) of any lengths, which are packed so that no work is spent on padding."""

LARGEST_BUCKET = 4096  # tokens; above it the GPU is the bottleneck, not the host, and memory grows


@dataclass(frozen=True)
class ChunkSizes:
    """Default numbers of tokens per forward."""

    single: int  # of one text
    batch: int  # of all texts of a batch together: fills the device, and bounds its memory
    shared: int  # of one text, while texts that decode wait for the device


CHUNK_SIZES = {"cpu": ChunkSizes(512, 2**10, 512), "cuda": ChunkSizes(LARGEST_BUCKET, 2**14, 2**11)}
LARGEST_PADDED = 512  # tokens of a bucket that a shorter part shares; above it the padding would take time
_SMALLEST_BUCKET = 16  # a shorter one takes the same time
SNAPSHOT_CHUNK = 512  # tokens between two snapshots of a prefix cache, and between two steps of an engine
SCORING_CHUNK = 1024  # tokens whose hidden states are all kept until they are scored


def chunk_sizes(device: torch.device) -> ChunkSizes:
    """The chunk sizes of ``device``."""
    return CHUNK_SIZES.get(device.type, CHUNK_SIZES["cuda"])


@dataclass(frozen=True)
class Chunk:
    """The input of one forward."""

    ids: Tensor  # (b, l); (1, l) where texts are packed
    marks: dict[str, Tensor]  # the backbone's ``attention_mask`` or ``cu_seqlens``, if any
    lengths: list[int]  # number of tokens of each text in it
    ends: list[int]  # the texts whose last token is in it
    positions: Tensor | None  # (len(ends),) int64 of those tokens, where texts are packed
    done: int  # tokens read after it
    is_last: bool


def texts_of(prompts: Prompts) -> tuple[Prompts, int]:
    """(the prompts, with a single text as (1, l); the length of the longest)."""
    if not isinstance(prompts, Tensor):
        if len(prompts) != 1:
            return prompts, max(map(len, prompts), default=0)
        prompts = prompts[0][None]
    return prompts, prompts.shape[1]


def row_count(texts: Prompts) -> int:
    """The number of texts."""
    return texts.shape[0] if isinstance(texts, Tensor) else len(texts)


def size_of_chunks(device: torch.device, texts: Prompts, given: int | None) -> int:
    """Tokens per forward: ``given``, or the table's.

    They count per row of (b, l) prompts, and over all rows together where texts are packed.

    Raises:
        ValueError: ``given`` is below 1.
    """
    if given is not None:
        if given < 1:
            raise ValueError(f"chunk_size is {brief(given)}; it must be 1 or more")
        return given
    sizes, rows = chunk_sizes(device), row_count(texts)
    if rows == 1:
        return sizes.single
    return max(64, sizes.batch // rows) if isinstance(texts, Tensor) else sizes.batch


def chunks(texts: Prompts, attention_mask: Tensor | None, size: int) -> Iterator[Chunk]:
    """The prompts in chunks of ``size``: columns of (b, l) prompts, or as much of each packed text as fits together."""
    if isinstance(texts, Tensor):
        rows, length = texts.shape
        for start in range(0, length, size):
            stop = min(length, start + size)
            mask = {} if attention_mask is None else {"attention_mask": attention_mask[:, start:stop]}
            last, ids = stop == length, texts[:, start:stop]
            ends = list(range(rows)) if last else []
            yield Chunk(ids, mask, [stop - start] * rows, ends, None, rows * stop, last)
        return
    unread, done, total = list(texts), 0, sum(map(len, texts))
    device = texts[0].device
    while done < total:
        left = [n for text in unread if (n := len(text))]
        share = max(left) if sum(left) <= size else max(1, size // len(left))
        parts = [text[:share] for text in unread]
        lengths = list(map(len, parts))
        ends = [i for i, text in enumerate(unread) if 0 < len(text) <= share]
        unread = [text[share:] for text in unread]
        bounds = torch.tensor([0, *lengths], dtype=torch.int64, device="cpu").cumsum(0)
        done += sum(lengths)
        marks = {"cu_seqlens": to_device(device, bounds.to(torch.int32))}
        positions = to_device(device, bounds[1:][ends] - 1)
        yield Chunk(torch.cat(parts)[None], marks, lengths, ends, positions, done, done == total)


def parts(length: int, longest: int) -> list[int]:
    """The tokens of each forward by which captured graphs read a prompt (`mambakit.decoding.bucket_graphs`).

    Above `LARGEST_PADDED` they are powers of two, in descending order; the rest, last, is any number up to it. None is
    above ``longest`` or `LARGEST_BUCKET`.
    """
    size, rest, found = min(longest, LARGEST_BUCKET), length, []
    if size > LARGEST_PADDED:
        size = 1 << (size.bit_length() - 1)
    while size > LARGEST_PADDED:
        found += [size] * (rest // size)
        size, rest = size // 2, rest % size
    return found + [size] * (rest // size) + [rest % size] * (rest % size > 0)


def padded_buckets() -> list[int]:
    """Those that also serve fewer tokens than they have, the smallest first."""
    return [1 << i for i in range(_SMALLEST_BUCKET.bit_length() - 1, LARGEST_PADDED.bit_length())]


def bucket_of(tokens: int) -> int:
    """The length of the graph that reads so many tokens: a power of two; up to `LARGEST_PADDED` the rest is padding."""
    return max(_SMALLEST_BUCKET, 1 << (tokens - 1).bit_length())
