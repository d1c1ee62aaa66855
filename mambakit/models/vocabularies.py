"""Tokenizers for checkpoints that come without one: state-spaces' original format has no place for it.

The number of tokens says which one a model was trained with, where only one is in use: GPT-NeoX's, or raw bytes. Of
letters of DNA there are several orders: their tokenizer is named by the user.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from mambakit.errors import CheckpointError

_log = logging.getLogger("mambakit")
NEOX = "EleutherAI/gpt-neox-20b"
# HyenaDNA's order; Caduceus' and other models of mamba_ssm's on DNA have it.
_HYENA = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N")


@dataclass(frozen=True)
class StandIn:
    """A tokenizer that checkpoints of some sizes of vocabulary take.

    Attributes:
        name: what `AutoTokenizer.from_pretrained` and ``--tokenizer`` take.
        low, high: the sizes.
        what: for people.
        only: whether no other tokenizer has these sizes.
    """

    name: str
    low: int
    high: int
    what: str
    only: bool


STAND_INS = (
    StandIn(NEOX, 50254, 50304, f"GPT-NeoX's ({NEOX}), which models of the Pile and SlimPajama have", True),
    StandIn("raw-bytes", 256, 256, "a token for each of the 256 bytes, as MambaByte's models have", True),
    StandIn("hyena-dna", 12, 16, "letters of DNA in HyenaDNA's order", False),
)


MADE = ("raw-bytes", "hyena-dna")
"""Names of tokenizers that need no file."""


def made(name: str) -> Any:
    """The tokenizer of a name in `MADE`."""
    return _raw_bytes() if name == "raw-bytes" else _hyena_dna()


def stand_in(checkpoint: str, size: int) -> str:
    """The name of the tokenizer for a checkpoint without one; logs a line that says so.

    Args:
        checkpoint: its name, for messages.
        size: its number of tokens, before padding.

    Raises:
        CheckpointError: the number of tokens does not say it.
    """
    found = next((s for s in STAND_INS if s.low <= size <= s.high), None)
    if found is not None and found.only:
        _log.warning("%s holds no tokenizer; with %s tokens it takes %s", checkpoint, f"{size:,}", found.what)
        return found.name
    if found is not None:
        raise CheckpointError(
            f"{checkpoint} holds no tokenizer, and its {size} tokens are likely {found.what}: if they are, give "
            f"--tokenizer {found.name} (AutoTokenizer.from_pretrained({found.name!r})), else the folder of the one "
            "that it was trained with"
        )
    raise CheckpointError(
        f"{checkpoint} holds no tokenizer, and {size:,} tokens are no known one's; give the one that it was trained "
        "with: --tokenizer FOLDER, or save its files into the folder"
    )


def _fast(tokenizer: Any, **tokens: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **tokens)


def _raw_bytes() -> Any:
    """Byte b is token b; there is no end-of-text token. The letters that stand for bytes are those of ByteLevel."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in set(shown)]
    letters = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    tokenizer = Tokenizer(models.BPE(vocab={letters[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer)


def _hyena_dna() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(_HYENA)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), ""), *(normalizers.Replace(x.lower(), x) for x in "ACGTN")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"bos_token": "[BOS]", "eos_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    return _fast(tokenizer, **names, mask_token="[MASK]", cls_token="[CLS]", sep_token="[SEP]")
