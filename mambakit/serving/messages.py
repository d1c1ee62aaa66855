"""The messages between the API server and a replica's process, which travel over one pipe in each direction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mambakit.serving.logs import LogOptions


@dataclass(frozen=True)
class WorkerOptions:
    """What a replica's process needs to start.

    Attributes:
        model: hub id, folder or GGUF file.
        tokenizer: hub id, folder or name of one; None: the model's.
        device: "cpu", "cuda:0", ...
        dtype: of the weights: "auto", "float32", ...; None is float32 on a CPU, the checkpoint's elsewhere.
        slots: texts that one replica decodes together.
        sharers: replicas that compute on this machine's CPU; each takes its part of the threads.
        chunk_size: prompt tokens per forward; None is 512 on a CPU and 2,048 elsewhere.
        prefix_cache_bytes: budget of the prefix cache; 0 disables it.
        prefix_cache_folder: keep its states in files, too, which all replicas have in common; None: in memory alone.
        prefix_cache_disk_bytes: budget of those files.
        states_folder: where states are kept that clients ask for; None: none are.
        states_memory_bytes: budget of those that are in memory, too.
        draft_model: a smaller model of the same vocabulary that drafts for the texts; None: none does.
        prompt_lookup: draft what followed the same tokens earlier in the text.
        draft_tokens: of a draft, at most.
        state: a file of one row's state that every text starts from; None: zeros.
        heartbeat_seconds: a replica that sends nothing for longer is killed and restarted.
        progress_seconds: the same for one that has work and completes no step.
        load_seconds: the same for one that is not ready in this time.
        logs: of its process, to standard error.
    """

    model: str
    tokenizer: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    slots: int = 8
    sharers: int = 1
    chunk_size: int | None = None
    prefix_cache_bytes: int = 0
    prefix_cache_folder: str | None = None
    prefix_cache_disk_bytes: int = 4 << 30
    states_folder: str | None = None
    states_memory_bytes: int = 256 << 20
    draft_model: str | None = None
    prompt_lookup: bool = False
    draft_tokens: int = 4
    state: str | None = None
    heartbeat_seconds: float = 20.0
    progress_seconds: float = 300.0
    load_seconds: float = 1800.0
    logs: LogOptions = field(default_factory=LogOptions)


@dataclass(frozen=True)
class Layout:
    """What a state of a server's model is.

    Attributes:
        fingerprint: of the model.
        tensors: by name, (dtype as safetensors names it, shape) of the state of one text.
        vocab_size: token ids are below it.
    """

    fingerprint: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    vocab_size: int


@dataclass(frozen=True)
class StateTask:
    """What a text has to do with states that are kept (`mambakit.serving.states`).

    Attributes:
        start: the blob of the state that it starts from; "" for none.
        keep: whether to write the state at its end to a blob, which its last piece names.
    """

    start: str = ""
    keep: bool = False


@dataclass(frozen=True)
class Kept:
    """A state that is durable: its blob, and what it has read. Or why there is none.

    Attributes:
        blob: SHA-256 of the file.
        bytes: its size.
        tokens: how many tokens of text it stands after.
        digest: a hash of those tokens; "" where they are not known.
        error, status, code: why it could not be kept, as in an `ApiError`; "" where it was.
    """

    blob: str
    bytes: int
    tokens: int
    digest: str = ""
    error: str = ""
    status: int = 500
    code: str | None = None


@dataclass(frozen=True)
class TextOptions:
    """What is asked of one text besides its sampling, its length and its stop strings.

    Attributes:
        min_new_tokens: no end-of-text token is chosen before so many new tokens.
        ignore_ends: whether end-of-text tokens do not end the text.
        log_probs: how many of the likeliest tokens come with every token, with their log-probabilities and its own;
            None: none does.
        prompt_log_probs: whether those of the prompt's tokens come, too.
        constraint: (kind, text): an argument of `mambakit.generation.constrain.Constraint` and its value.
        continuations: int64 ids of texts to score after the prompt. Nothing is generated then.
        state: what it has to do with states that are kept.
        cache_salt: of the prefix cache: prompts of another salt are never found.
    """

    min_new_tokens: int = 0
    ignore_ends: bool = False
    log_probs: int | None = None
    prompt_log_probs: bool = False
    constraint: tuple[str, str] | None = None
    continuations: tuple[bytes, ...] | None = None
    state: StateTask | None = None
    cache_salt: str = ""

    @property
    def scores(self) -> bool:
        """Whether the prompt, or texts after it, are to be scored."""
        return self.prompt_log_probs or self.continuations is not None


@dataclass(frozen=True)
class Task:
    """Server to worker: generate one text, or score one."""

    id: int
    prompt_ids: bytes
    """int64, at least one id; bytes, because a list of a million numbers takes a second to pickle."""
    sampling: dict[str, Any]
    max_new_tokens: int
    """0 where the prompt is only given back or scored."""
    stop: tuple[str, ...] = ()
    share: tuple[Any, ...] = ()
    """Its owner, from the outside in: (key, client, request). Slots are divided evenly at every level."""
    options: TextOptions = TextOptions()


@dataclass(frozen=True)
class Cancel:
    """Server to worker: the client of this text is gone."""

    id: int


@dataclass(frozen=True)
class Stop:
    """Server to worker: exit."""


@dataclass(frozen=True)
class Ready:
    """Worker to server: the model is loaded and warmed up.

    Attributes:
        layout: of the states of its texts, where states are kept.
    """

    layout: Layout | None = None


@dataclass(frozen=True)
class Failed:
    """Worker to server: why the process is about to end."""

    reason: str


class Heartbeat(NamedTuple):
    """Worker to server, at short intervals: the process runs."""

    steps: int
    """Engine steps that the main thread has completed since the start."""
    busy: bool
    """Whether it has work."""


class Scored(NamedTuple):
    """A token and its log-probability."""

    token: int
    log_prob: float | None
    """None where nothing precedes the token."""
    offset: int = 0
    """Characters of the text before it; 0 for tokens of a prompt."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, log-probability) of the likeliest tokens at its place, best first."""


class Continuation(NamedTuple):
    """A scored continuation."""

    log_probs: bytes
    """float32 of each token."""
    greedy: bool
    """Whether every token is the likeliest."""


class Piece(NamedTuple):
    """What one text has gained since its last piece."""

    id: int
    text: str = ""
    tokens: int = 0
    finish_reason: str = ""
    """"" while generation continues; then "stop", "length", "cancelled" or "error"."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache; set in the last piece."""
    error: str = ""
    """Why this text failed; the others of the batch continue."""
    status: int = 500
    """HTTP status of the error: 400 where the request was at fault."""
    log_probs: tuple[Scored, ...] = ()
    """Of the tokens whose text is in this and earlier pieces, where they were asked for."""
    prompt_log_probs: tuple[Scored, ...] = ()
    continuations: tuple[Continuation, ...] = ()
    kept: Kept | None = None
    """In the last piece of a text whose state was to be kept."""
    code: str = ""
    """Of the error, as `ApiError.code`."""


class Batch(NamedTuple):
    """Worker to server: the output of some steps, and the load of the replica."""

    busy: int
    """Slots in use."""
    waiting: int
    """Texts at the replica without a slot."""
    pieces: list[Piece]
