"""Who answers in `mambakit chat`: a model in this process, whose states are kept at every turn, or a server."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mambakit.commands.conversation import Turn
from mambakit.commands.remote import Remote, RemoteError
from mambakit.errors import UsageError


class Answerer(Protocol):
    """What a chat needs of who answers.

    Attributes:
        name: of the model.
        reading: how many tokens the last reply read, or None where that is not known.
    """

    name: str
    reading: int | None

    def reply(self, turn: Turn, sampling: dict[str, Any]) -> Iterator[str]:
        """The text after ``turn``, whose parent's path was said before; its memory is filled in at the end."""

    def describe(self, turn: Turn) -> str:
        """What is kept of a turn, in one line."""

    def save(self, turn: Turn, file: str) -> str | None:
        """Write the turn's state to a file. Returns the text that it has read; None where there is no state."""

    def load(self, turn: Turn, file: str, text: str) -> None:
        """Read it back. Raises a ValueError for a file of another model."""


@dataclass(frozen=True)
class Plain:
    """How turns are written for a model without a chat template: each is a line that begins with its label."""

    user: str = "User"
    assistant: str = "Assistant"

    def text(self, turns: Sequence[Turn]) -> str:
        labels = {"user": f"{self.user}: ", "assistant": f"{self.assistant}:", "system": ""}
        parts = []
        for turn in turns:
            # A reply stands as it was written, so that what has read it need not read it again.
            said = turn.text if turn.role == "assistant" else turn.text.strip()
            parts.append(f"{labels[turn.role]}{said}\n")
        return "".join(parts) + labels["assistant"]

    @property
    def stop(self) -> str:
        return f"\n{self.user}:"


@dataclass(frozen=True)
class Memory:
    """
    Attributes:
        text: that ``state`` has read, its unread token included.
        ids: the tokens of it, which a repetition penalty counts.
    """

    text: str
    state: Any
    ids: list[int]


class LocalModel:
    """A model in this process. A reply reads what is new since the nearest turn whose state was kept."""

    def __init__(self, args: argparse.Namespace, plain: Plain | None):
        from mambakit.commands.loading import load

        self.model, self.tokenizer = load(args, inference=True)
        self.name = str(args.model or "the model that ships with mambakit")
        self.plain = Plain() if plain is None and not self.tokenizer.chat_template else plain
        self.reading: int | None = 0

    def _text(self, turns: Sequence[Turn]) -> str:
        if self.plain is not None:
            return self.plain.text(turns)
        import jinja2

        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise UsageError(f"the model's chat template refuses these turns: {error}") from error
        return str(text)

    def reply(self, turn: Turn, sampling: dict[str, Any]) -> Iterator[str]:
        from mambakit.generation.stream import SamplingParams, Stream

        assert turn.parent is not None
        text = self._text(turn.parent.path())
        known = self._read(turn.parent, text)
        turn.parent.memory = known  # where a template shows a reply otherwise than it was written
        options = dict(sampling)
        most, stops = options.pop("max_new_tokens"), tuple(options.pop("stop"))
        if self.plain is not None:
            stops = (*stops, self.plain.stop)
        prompt = known.state.prompt()
        before = known.state.cache.get_seq_length()
        stream = Stream(
            self.model, self.tokenizer, sampling=SamplingParams(**options), max_new_tokens=most, stop=stops,
            context=self._tensor(known.ids[: len(known.ids) - len(prompt["prompt_ids"])]), **prompt,
        )  # fmt: skip
        for piece in stream:
            turn.text += piece
            yield piece
        turn.memory = self._after(stream, known, prompt["prompt_ids"].tolist(), before)

    def _read(self, parent: Turn, text: str) -> Memory:
        """``text`` with its last token unread."""
        from mambakit.generation.state import State

        for turn in reversed(parent.path()):
            memory = turn.memory
            if memory is not None and text.startswith(memory.text) and (new := self._ids(text[len(memory.text) :])):
                self.reading = len(new)
                return Memory(text, memory.state.extend(self.model, self._tensor(new)), memory.ids + new)
        ids = self._ids(text) or self._first()
        self.reading = len(ids)
        return Memory(text, State.read(self.model, self._tensor(ids)), ids)

    def _after(self, stream: Any, known: Memory, prompt: list[int], before: int) -> Memory | None:
        """What is kept of a whole reply: a state may have one token unread."""
        import torch

        from mambakit.generation.state import State

        tokens = [*prompt, *stream.tokens]
        read = stream.cache.get_seq_length() - before
        if not len(tokens) - 1 <= read <= len(tokens):
            return None
        said = self.tokenizer.decode(stream.tokens, skip_special_tokens=False)
        pending = torch.tensor([tokens[read:]], dtype=torch.int64, device="cpu").reshape(1, len(tokens) - read)
        return Memory(known.text + said, State(stream.cache, pending), known.ids + stream.tokens)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _first(self) -> list[int]:
        from mambakit.generation.start_token import find_start_token

        start = find_start_token(self.tokenizer)
        if start is None:
            raise UsageError("the chat is empty and the tokenizer has no bos token to start from; say something")
        return [start]

    @staticmethod
    def _tensor(ids: list[int]) -> Any:
        import torch

        return torch.tensor(ids, dtype=torch.int64, device="cpu")

    def describe(self, turn: Turn) -> str:
        if turn.memory is None:
            return "no state is kept of this turn; the next reply reads what is missing"
        state = turn.memory.state
        size = sum(tensor.nbytes for tensor in state.tensors().values())
        return f"a state of {state.cache.get_seq_length():,} tokens, {size:,} bytes"

    def save(self, turn: Turn, file: str) -> str | None:
        if turn.memory is None:
            return None
        turn.memory.state.save(file, self.model)
        return str(turn.memory.text)

    def load(self, turn: Turn, file: str, text: str) -> None:
        from mambakit.generation.state import State

        turn.memory = Memory(text, State.load(file, self.model), self._ids(text))


class RemoteModel:
    """A server's model. The server knows the turns before from its own cache."""

    def __init__(self, url: str, key: str | None, plain: Plain | None):
        self.server = Remote(url, key if key is not None else os.environ.get("MAMBAKIT_API_KEY"))
        self.name = f"{self.server.model()} at {self.server.url}"
        self.plain = plain
        self.reading: int | None = None

    def reply(self, turn: Turn, sampling: dict[str, Any]) -> Iterator[str]:
        assert turn.parent is not None
        body = dict(sampling)
        body["max_tokens"] = body.pop("max_new_tokens")
        body["stream_options"] = {"include_usage": True}
        for piece in self._pieces(turn.parent.path(), body):
            turn.text += piece
            yield piece

    def _pieces(self, turns: Sequence[Turn], body: dict[str, Any]) -> Iterator[str]:
        if self.plain is None:
            messages = [{"role": turn.role, "content": turn.text} for turn in turns]
            try:
                yield from self._stream("/v1/chat/completions", body | {"messages": messages})
                return
            except RemoteError as error:
                if error.code != "chat_template_missing" and error.status != 404:
                    raise
            self.plain = Plain()
        stops = [*body["stop"], self.plain.stop]
        yield from self._stream("/v1/completions", body | {"prompt": self.plain.text(turns), "stop": stops})

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[str]:
        for event in self.server.stream(path, body):
            for choice in event["choices"]:
                if piece := choice.get("text") or choice.get("delta", {}).get("content"):
                    yield piece
            if usage := event.get("usage"):
                known = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
                self.reading = usage["prompt_tokens"] - known

    def describe(self, turn: Turn) -> str:
        return "the server keeps what it has read; a turn that it knows is not read again"

    def save(self, turn: Turn, file: str) -> str | None:
        return None

    def load(self, turn: Turn, file: str, text: str) -> None:
        raise UsageError("a server keeps its own states; the chat's words are loaded, and are read once more")
