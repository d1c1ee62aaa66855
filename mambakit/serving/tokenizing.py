"""The tokenizer of a server, and the limits of requests: all that the API server needs of the model."""

from __future__ import annotations

from typing import Any

from mambakit.quoting import quoted
from mambakit.serving.api.declarations import Limits


def load_tokenizer(options: Any) -> tuple[Any, Limits]:
    """(tokenizer, limits of requests) of a server with these `mambakit.serving.server.ServerOptions`."""
    from mambakit.models.auto import AutoConfig, AutoTokenizer

    limits = Limits(
        model=options.name,
        vocab_size=AutoConfig.from_pretrained(options.worker.model).vocab_size,
        max_new_tokens=options.max_new_tokens,
        max_prompt_tokens=options.max_prompt_tokens,
        most_texts=min(options.max_texts, options.max_waiting + options.worker.slots * len(options.devices)),
    )
    tokenizer = AutoTokenizer.from_pretrained(options.worker.tokenizer or options.worker.model)
    if options.worker.tokenizer is not None:
        require_fit(options.worker.tokenizer, tokenizer, limits.vocab_size)
    if options.chat_template is not None:
        tokenizer.chat_template = options.chat_template
    return tokenizer, limits


def require_fit(name: str, tokenizer: Any, vocab_size: int) -> None:
    """
    Raises:
        ValueError: the tokenizer has tokens that the model does not.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"--tokenizer {quoted(name)} has tokens up to {largest}, and the model's end at {vocab_size - 1}; name the "
            "tokenizer that it was trained with"
        )
