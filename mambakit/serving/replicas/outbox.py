"""The output of a replica's process: token ids become text, stop strings end texts, and an error ends its own text
only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from mambakit.errors import ConstraintError, LogitsError
from mambakit.quoting import cut
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Batch, Cancel, Continuation, Kept, Piece, Scored, Task
from mambakit.serving.replicas.heartbeat import Channel

if TYPE_CHECKING:
    from mambakit.decoding.log_probs import TokenLogProb
    from mambakit.serving.replicas.states import HeldState, Keeper, Left

_log = logging.getLogger("mambakit.serving")


@contextlib.contextmanager
def end_of_process() -> Iterator[None]:
    """The end of a thread that holds the pipe is the end of the process, which is useless without it."""
    try:
        yield
    except (EOFError, OSError):  # the server is gone
        pass
    except BaseException:
        _log.exception("a thread of the replica's process failed, which ends it")
        os._exit(1)
    os._exit(0)


class Text:
    """One text that is being generated."""

    def __init__(self, task: Task, tokenizer: Any):
        from mambakit.generation.stream import StoppingDecoder

        self.id = task.id
        self.cached_tokens = 0
        self.error, self.status, self.code = "", 500, ""
        self.ended = False
        self.log_probs: Sequence[TokenLogProb] | None = None
        """Of all tokens so far, where they are to be sent; the main thread adds to it before it passes tokens on."""
        self.prompt_log_probs: tuple[Scored, ...] = ()
        self.continuations: tuple[Continuation, ...] = ()
        """Scores that are to be sent with the next piece."""
        self.left: Left | None = None
        """What it leaves where its state is to be kept; the main thread completes it before the last event."""
        self.goes_on = False
        """Whether it starts from a client's state."""
        self.reads = False
        """Whether nothing is written: its prompt is read for the state after it."""
        self._parts: list[str] = []  # what has been shown, and where each token's text ends; of such texts
        self._ends: list[int] = []
        self._tokenizer = tokenizer
        self._unsent: deque[tuple[Scored, int]] = deque()  # with the number of characters up to each token's end
        self._tokens = 0
        self._decoder, self._plain = StoppingDecoder(tokenizer, task.stop), not task.stop

    @contextlib.contextmanager
    def bad_request(self) -> Iterator[None]:
        """Values that are refused in here are the client's error: 400."""
        try:
            yield
        except (TypeError, ValueError):
            self.status = 400
            raise

    def blame(self, error: Exception) -> None:
        """A constraint that grows too complex is the client's error. So are logits that are no numbers after a client's
        state: an imported file may hold any. A state's file that is gone or damaged has a status of its own."""
        if isinstance(error, ApiError):
            self.status, self.code = error.status, error.code or ""
        elif isinstance(error, ConstraintError) or (self.goes_on and isinstance(error, LogitsError)):
            self.status = 400

    def fail(self, error: Exception) -> None:
        """Note an exception. One line goes to the client; the traceback to the log, unless the client is at fault."""
        self.blame(error)
        if self.status >= 500:
            _log.error("a text failed", exc_info=error)
        self.error = f"{type(error).__name__}: {cut(str(error), 500)}" if self.status == 500 else cut(str(error), 500)

    def add(self, tokens: list[int]) -> tuple[str, int]:
        """(the text that can be sent now, how many of the tokens belong to the text); a stop string ends it."""
        if self._plain and self.log_probs is None and self.left is None:
            self._tokens += len(tokens)
            return self._decoder.push_all(tokens), len(tokens)
        shown = ""
        for count, token in enumerate(tokens, 1):
            shown += self._add(token)
            if self.ended:
                return shown, count
        return shown, len(tokens)

    def _add(self, token: int) -> str:
        before = self._decoder.decoded
        piece = self._decoder.push(token)
        self.ended = self._decoder.stopped
        if self.log_probs is not None:
            found = self.log_probs[self._tokens]
            self._unsent.append((Scored(token, found.log_prob, before, found.top), self._decoder.decoded))
        if self.left is not None:
            self._parts.append(piece)
            self._ends.append(self._decoder.decoded)
        self._tokens += 1
        return piece

    def state(self) -> HeldState:
        """The state after the prompt and the text that has been shown, to the character."""
        assert self.left is not None
        if not self.stopped:
            return self.left.state(len(self.left.tokens), [])
        ends, shown = [0, *self._ends], self._decoder.shown
        count = next((i for i, end in enumerate(self._ends) if end > shown), len(self._ends))
        while count and ends[count] == ends[count - 1]:  # part of a character that is not shown
            count -= 1
        rest = "".join(self._parts)[ends[count] : shown]
        more = self._tokenizer(rest, add_special_tokens=False, verbose=False).input_ids if rest else []
        return self.left.state(count, more)

    def take_log_probs(self) -> tuple[Scored, ...]:
        """Those of tokens whose text has been shown; of a text that has ended, all but those of its stop string."""
        if not self._unsent:
            return ()
        shown = self._decoder.shown
        found = []
        while self._unsent:
            scored, end = self._unsent[0]
            if self.stopped and scored.offset >= shown:
                self._unsent.clear()
            elif end > shown and not self.ended:
                break
            else:
                found.append(scored)
                self._unsent.popleft()
        return tuple(found)

    def take_scores(self) -> tuple[tuple[Scored, ...], tuple[Continuation, ...]]:
        """(log-probabilities of the prompt, scored continuations), each once."""
        found = self.prompt_log_probs, self.continuations
        self.prompt_log_probs, self.continuations = (), ()
        return found

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._decoder.stopped

    def rest(self) -> str:
        """The text that was held back as the possible beginning of a stop string, when no more tokens come."""
        self.ended = True
        return self._decoder.rest()


# (text, tokens, "") or (text, None, why it ended); or a whole piece
Event: TypeAlias = "tuple[Text, list[int] | None, str] | Piece"


class Outbox:
    """The thread that sends to the server. All that arrives while it decodes and sends is sent as one batch."""

    def __init__(self, connection: Channel, inbox: queue.SimpleQueue[Any]):
        self._connection, self._inbox = connection, inbox
        self._queue: queue.SimpleQueue[tuple[int, int, list[Event]]] = queue.SimpleQueue()
        self._last_load = (0, 0)
        self.keeper: Keeper | None = None
        """Writes the states that are to be kept; the last piece of such a text is sent when its state is durable."""

    def kept(self, last: Piece, kept: Kept) -> None:
        """Send the last piece of a text whose state was written, or could not be."""
        self._queue.put((*self._last_load, [last._replace(kept=kept)]))

    def put(self, busy: int, waiting: int, events: list[Event]) -> None:
        if events or (busy, waiting) != self._last_load:
            self._last_load = (busy, waiting)
            self._queue.put((busy, waiting, events))

    def run(self) -> None:
        with end_of_process():
            while True:
                busy, waiting, events = self._queue.get()
                while not self._queue.empty():
                    busy, waiting, more = self._queue.get()
                    events = events + more
                self._connection.send(Batch(busy, waiting, self._pieces(events)))

    def _pieces(self, events: list[Event]) -> list[Piece]:
        pieces: dict[int, Piece] = {}
        for event in events:
            if isinstance(event, Piece):
                pieces[event.id] = event
                continue
            text, written, reason = event
            if text.ended:  # tokens after a stop string, until the engine has read the `Cancel`
                if written is None:
                    self._keep(text, Piece(text.id, finish_reason="stop", cached_tokens=text.cached_tokens))
                continue
            shown, tokens, reason = self._take(text, written, reason)
            ended = written is None
            if text.left is not None and reason in ("stop", "length"):
                if ended:
                    self._keep(text, Piece(text.id, finish_reason=reason, cached_tokens=text.cached_tokens))
                reason = ""
            before = pieces.get(text.id, Piece(text.id))
            prompt, continuations = text.take_scores()
            pieces[text.id] = Piece(
                text.id, before.text + shown, before.tokens + tokens, reason, text.cached_tokens if reason else 0,
                text.error if reason == "error" else "", text.status, before.log_probs + text.take_log_probs(),
                before.prompt_log_probs or prompt, before.continuations or continuations,
                code=text.code,
            )  # fmt: skip
        return list(pieces.values())

    def _keep(self, text: Text, last: Piece) -> None:
        if text.left is not None and self.keeper is not None:
            self.keeper.add(last, text.state)

    def _take(self, text: Text, written: list[int] | None, reason: str) -> tuple[str, int, str]:
        """(text that can be sent after this event, tokens, why the text has ended or "")."""
        try:
            if written is None:
                shown = text.rest() if reason in ("stop", "length") else ""
                return shown, 0, "stop" if text.stopped else reason
            shown, tokens = text.add(written)
        except Exception as error:  # the tokenizer's: of this text's tokens alone
            text.fail(error)
            text.ended = True
            shown, tokens, reason = "", len(written or ()), "error"
        if text.ended:
            reason = reason or "stop"
            self._inbox.put(Cancel(text.id))
        return shown, tokens, reason
