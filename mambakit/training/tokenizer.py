"""A byte-level BPE tokenizer for a text: trained with `tokenizers`, saved so that transformers' AutoTokenizer reads it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"
# A BPE of a few thousand merges is settled long before this much text; more only costs time.
_SAMPLE_CHARACTERS = 30_000_000


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over every ``documents``' text, with END as token 0; no text is unrepresentable."""
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one and words apart, as GPT-NeoX's tokenizer has it but for the digits.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(documents), trainer)
    return tokenizer


def _pieces(documents: Iterable[str], size: int = 100_000) -> Iterable[str]:
    """An even sample of the documents, in pieces that `tokenizers` can share out over cores."""
    documents = list(documents)
    total = sum(map(len, documents))
    stride = max(1, -(-total // _SAMPLE_CHARACTERS))
    for document in documents:
        for start in range(0, len(document), size * stride):
            yield document[start : start + size]


def save_tokenizer(tokenizer: Tokenizer, folder: Path, model_max_length: int = 10**9) -> None:
    """Write tokenizer.json and tokenizer_config.json; END is the bos, eos and padding token."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.save_pretrained(folder)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"there is no {path}; give the folder of a saved tokenizer, or leave `tokenizer` empty")
    return Tokenizer.from_file(str(path))
