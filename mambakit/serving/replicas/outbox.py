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

from mambakit.quoting import cut
from mambakit.serving.messages import Batch, Cancel, Continuation, Piece, Scored, Task
from mambakit.serving.replicas.heartbeat import Channel

if TYPE_CHECKING:
    from mambakit.decoding.log_probs import TokenLogProb

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
        self.error, self.status = "", 500
        self.ended = False
        self.log_probs: Sequence[TokenLogProb] | None = None
        """Of all tokens so far, where they are to be sent; the main thread adds to it before it passes tokens on."""
        self.prompt_log_probs: tuple[Scored, ...] = ()
        self.continuations: tuple[Continuation, ...] = ()
        """Scores that are to be sent with the next piece."""
        self._unsent: deque[tuple[Scored, int]] = deque()  # with the number of characters up to each token's end
        self._tokens = 0
        self._decoder = StoppingDecoder(tokenizer, task.stop)

    @contextlib.contextmanager
    def bad_request(self) -> Iterator[None]:
        """Values that are refused in here are the client's error: 400."""
        try:
            yield
        except (TypeError, ValueError):
            self.status = 400
            raise

    def fail(self, error: Exception) -> None:
        """Note an exception. One line goes to the client; the traceback to the log, unless the client is at fault."""
        if self.status >= 500:
            _log.error("a text failed", exc_info=error)
        self.error = f"{type(error).__name__}: {cut(str(error), 500)}" if self.status == 500 else cut(str(error), 500)

    def add(self, token: int) -> str:
        """The text that can be sent now; a stop string ends it."""
        before = self._decoder.decoded
        piece = self._decoder.push(token)
        self.ended = self._decoder.stopped
        if self.log_probs is not None:
            found = self.log_probs[self._tokens]
            self._unsent.append((Scored(token, found.log_prob, before, found.top), self._decoder.decoded))
        self._tokens += 1
        return piece

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


# (text, token, "") or (text, None, why it ended)
Event: TypeAlias = "tuple[Text, int | None, str]"


class Outbox:
    """The thread that sends to the server. All that arrives while it decodes and sends is sent as one batch."""

    def __init__(self, connection: Channel, inbox: queue.SimpleQueue[Any]):
        self._connection, self._inbox = connection, inbox
        self._queue: queue.SimpleQueue[tuple[int, int, list[Event]]] = queue.SimpleQueue()
        self._last_load = (0, 0)

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
        for text, token, reason in events:
            if text.ended:
                continue  # tokens after a stop string, until the engine has read the `Cancel`
            shown, tokens, reason = self._take(text, token, reason)
            before = pieces.get(text.id, Piece(text.id))
            prompt, continuations = text.take_scores()
            pieces[text.id] = Piece(
                text.id, before.text + shown, before.tokens + tokens, reason, text.cached_tokens if reason else 0,
                text.error if reason == "error" else "", text.status, before.log_probs + text.take_log_probs(),
                before.prompt_log_probs or prompt, before.continuations or continuations,
            )  # fmt: skip
        return list(pieces.values())

    def _take(self, text: Text, token: int | None, reason: str) -> tuple[str, int, str]:
        """(text that can be sent after this event, tokens, why the text has ended or "")."""
        try:
            if token is None:
                shown = text.rest() if reason in ("stop", "length") else ""
                return shown, 0, "stop" if text.stopped else reason
            shown = text.add(token)
        except Exception as error:  # the tokenizer's: of this text's tokens alone
            text.fail(error)
            text.ended = True
            shown, reason = "", "error"
        if text.ended:
            reason = reason or "stop"
            self._inbox.put(Cancel(text.id))
        return shown, int(token is not None), reason
