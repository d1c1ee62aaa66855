"""States that a replica's texts start from and leave: read from their files, held in memory, written durably."""

from __future__ import annotations

import queue
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mambakit.generation.fingerprint import fingerprint
from mambakit.generation.prefix_snapshot import Snapshot, on_gpu
from mambakit.generation.state import State, fill_cache
from mambakit.modules import StateCache
from mambakit.ops._backends.captured_graph import between_captures
from mambakit.quoting import cut
from mambakit.serving.errors import ApiError
from mambakit.serving.messages import Kept, Layout, StateTask, Task, WorkerOptions
from mambakit.serving.states.places import AnyBlobs, blobs_of
from mambakit.serving.states.tensors import FORMAT, check, digest_of, header_of

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}  # fmt: skip


@dataclass(frozen=True)
class HeldState:
    """A state in memory.

    Attributes:
        tensors: by `Stack.key`, of one row, on the CPU.
        seen: how many tokens they have read.
        pending: tokens that come after those, not read yet.
        tokens: all of them; None where they are not known.
    """

    tensors: dict[str, Tensor]
    seen: int
    pending: array[int]
    tokens: array[int] | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values()) + 8 * len(self.tokens or ())

    def cache(self, model: Any) -> StateCache:
        """A copy on the model's device."""
        return fill_cache(model, self.tensors, self.seen)


@dataclass
class Left:
    """What a text leaves, to be written when all of its output is known.

    Attributes:
        start: the state that it started from.
        prompt: the tokens of its prompt.
        states: `Request.states`, the latest first.
        tokens: the tokens that it has written.
    """

    start: HeldState | None
    prompt: array[int]
    states: list[StateCache] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def state(self, count: int, more: list[int]) -> HeldState:
        """The state after ``count`` of its tokens and ``more``."""
        given = self.start
        before = 0 if given is None else given.seen
        new = array("q", [*(() if given is None else given.pending), *self.prompt, *self.tokens[:count], *more])
        most = before + len(new) - len(more)
        latest = next(state for state in self.states if state.get_seq_length() <= most)
        seen = latest.get_seq_length()
        whole = given is None or given.tokens is not None
        tokens = None
        if whole:
            tokens = new if given is None or given.tokens is None else given.tokens[: given.seen] + new
        return HeldState(_on_host(latest.tensors()), seen, new[seen - before :], tokens)


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of a state's tensors, for a thread beside the engine's: while that captures a graph nobody may wait for
    the device, and what it has launched does not wait for the copies."""
    with between_captures():
        if on_gpu(tensors):
            return Snapshot({name: t.detach() for name, t in tensors.items()}).on_host()
        return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


@dataclass(frozen=True)
class Beginning:
    """Where a task begins.

    Attributes:
        cache: the state, of one row; None: zeros.
        pending: (p,) int64, tokens that come after it, before the prompt.
        ids: (l,) int64, those and the prompt.
        read: (r,) int64, the tokens that the state has read, where penalties count them.
        left: where the state at the end is to be kept.
    """

    cache: StateCache | None
    pending: Tensor
    ids: Tensor
    read: Tensor | None = None
    left: Left | None = None


class ReplicaStates:
    """The states of one replica: a memory tier over the files of all.

    Args:
        model: a causal language model in eval mode.
        options: the folder of the files, and the budget of the states held in memory. Those used longest ago are
            dropped from it.
    """

    def __init__(self, model: Any, options: WorkerOptions):
        self._model, self._memory_bytes = model, options.states_memory_bytes
        self._blobs = None if options.states_folder is None else blobs_of(options.states_folder)
        self.layout = None if self._blobs is None else layout_of(model)
        """Of the files, where there are any."""
        self._given = _given(options.state, model)
        self._held: OrderedDict[str, HeldState] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def begin(self, task: Task, write: bool) -> Beginning:
        """The beginning of a task, which is to ``write`` or only to read.

        Raises:
            ValueError: there is nothing to read.
            ApiError: the state's file is gone, damaged, or of another model.
        """
        asked = task.options.state or StateTask()
        state = self.load(asked.start) if asked.start else self._given
        prompt = array("q", task.prompt_ids)
        cache, pending, read = None, array("q"), None
        if state is not None:
            cache, pending = state.cache(self._model), state.pending
            if state.tokens is not None and task.sampling.get("repetition_penalty", 1) != 1:
                read = ids_of(state.tokens[: state.seen])
        if (write or task.options.continuations is not None) and not pending and not prompt:
            raise ValueError("the state has read all of its text, and the prompt is empty; give a prompt")
        left = Left(state, prompt) if asked.keep else None
        if left is not None and len(pending) + len(prompt) <= 1:  # there is nothing to read
            left.states = [self._model.backbone.new_cache(1) if cache is None else cache]
        return Beginning(cache, ids_of(pending), ids_of(pending + prompt), read, left)

    def after_scoring(self, beginning: Beginning, state: StateCache) -> Beginning:
        """The beginning of a text whose prompt was scored.

        Args:
            beginning: where the scoring began. Penalties count what its state had read, too.
            state: has read all of ``beginning.ids`` but the last.
        """
        ids, read = beginning.ids, beginning.ids[:-1]
        if beginning.read is not None:
            read = torch.cat([beginning.read, read])
        return Beginning(state, ids[:0], ids[-1:], read)

    def load(self, blob: str) -> HeldState:
        """
        Raises:
            ApiError: the file is gone, damaged, or of another model.
        """
        with self._lock:
            if (held := self._held.get(blob)) is not None:
                self._held.move_to_end(blob)
                return held
        blobs, layout = self._require_files()
        data = blobs.get(blob)
        file = check(data, layout, kept=True)
        _, places = header_of(data)
        tensors = {
            name: torch.frombuffer(bytearray(data[places[name].begin : places[name].end]), dtype=dtype).reshape(shape)
            for name, (dtype, shape) in _tensors_of(self._model).items()
        }
        held = HeldState(tensors, file.seen, file.pending, file.tokens)
        self._hold(blob, held)
        return held

    def keep(self, state: HeldState) -> Kept:
        """Write a state, durably.

        Raises:
            ApiError: the disk is full, or cannot be written to.
        """
        from safetensors.torch import save

        blobs, layout = self._require_files()
        tensors = dict(state.tensors)
        tensors["pending"] = torch.tensor([state.pending.tolist()], dtype=torch.int64, device="cpu").reshape(1, -1)
        if state.tokens is not None:
            tensors["tokens"] = ids_of(state.tokens).to(torch.int32)
        metadata = {"format": FORMAT, "fingerprint": layout.fingerprint, "seen_tokens": str(state.seen)}
        data = save(tensors, metadata)
        blob = blobs.put(data)
        self._hold(blob, state)
        digest = "" if state.tokens is None else digest_of(state.tokens)
        return Kept(blob, len(data), state.seen + len(state.pending), digest)

    def _require_files(self) -> tuple[AnyBlobs, Layout]:
        if self._blobs is None or self.layout is None:
            raise ApiError(400, "this server keeps no states; serve with --states FOLDER", code="states_off")
        return self._blobs, self.layout

    def _hold(self, blob: str, state: HeldState) -> None:
        with self._lock:
            if blob in self._held or state.nbytes > self._memory_bytes:
                return
            self._held[blob] = state
            self._bytes += state.nbytes
            while self._bytes > self._memory_bytes:
                self._bytes -= self._held.popitem(last=False)[1].nbytes


class Keeper:
    """A thread that writes states: neither the engine nor other texts wait for the disk.

    Args:
        states: where they are written to.
        done: called with what `add` was given, and the outcome; one that is not durable has an error.
    """

    def __init__(self, states: ReplicaStates, done: Callable[[Any, Kept], None]):
        self._states, self._done = states, done
        self._queue: queue.SimpleQueue[tuple[Any, Callable[[], HeldState]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, owner: Any, make: Callable[[], HeldState]) -> None:
        self._queue.put((owner, make))

    def _run(self) -> None:
        while True:
            owner, make = self._queue.get()
            try:
                kept = self._states.keep(make())
            except ApiError as error:
                kept = Kept("", 0, 0, error=error.message, status=error.status, code=error.code)
            except Exception as error:  # the text itself is whole
                kept = Kept("", 0, 0, error=f"{type(error).__name__}: {cut(str(error), 300)}", status=500)
            self._done(owner, kept)


def ids_of(tokens: array[int]) -> Tensor:
    """(l,) int64."""
    if not tokens:
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    return torch.frombuffer(bytearray(tokens.tobytes()), dtype=torch.int64)


def _given(path: str | None, model: Any) -> HeldState | None:
    """The state of --load-state, of one row; None without a file."""
    if path is None:
        return None
    state = State.load(path, model)
    if state.rows != 1:
        raise ValueError(f"{path} holds {state.rows} rows; select one and save it alone")
    tensors = {name: t.detach().to("cpu", copy=True) for name, t in state.cache.tensors().items()}
    return HeldState(tensors, state.cache.get_seq_length(), array("q", state.pending[0].tolist()), None)


def _tensors_of(model: Any) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    cache = model.backbone.new_cache(1)
    return {name: (t.dtype, tuple(t.shape)) for name, t in cache.tensors().items()}


def layout_of(model: Any) -> Layout:
    """What a state of this model is. Hashes the weights."""
    tensors = {name: (_DTYPES[dtype], shape) for name, (dtype, shape) in _tensors_of(model).items()}
    return Layout(fingerprint(model), tensors, model.config.vocab_size)
