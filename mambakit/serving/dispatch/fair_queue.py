"""Texts that wait for slots, in fair order: max-min fairness on every level of a text's path.

A path names the owner of a text, such as (key, client, request). At every level the next text is of the child with the
fewest texts at the replicas; of several, of the one with the least work done. Within a key, a text of
higher priority comes before all that. Each operation takes time logarithmic in the number of owners.
`mambakit.generation.turns` does the same for the slots of one engine, whose texts are few.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Generator, Hashable, Iterator

from mambakit.serving.dispatch.jobs import Job

Path = tuple[Hashable, ...]
Key = tuple[float, float, float, float, int]
_LEAF = object()  # the name of every leaf: a path may be the beginning of another


class _Node:
    """A node of the tree of paths; a leaf holds texts. ``taken`` texts of it are at the replicas."""

    def __init__(self, parent: _Node | None, name: Hashable, order: int):
        self.parent, self.name, self.order = parent, name, order
        self.children: dict[Hashable, _Node] = {}
        self.texts: list[tuple[int, int, Job]] = []  # of a leaf: a heap of (priority, number, text)
        self.waiting: dict[int, int] = {}  # priority -> how many texts wait
        self.taken = self.size = 0  # size: waiting and at the replicas
        self.deadline = math.inf
        # A newcomer starts level with who was last in turn: not ahead of all others because it has had nothing yet.
        self.served: float = parent.turn if parent else 0.0
        self.turn: float = 0.0  # what the child that was last in turn had been served
        self._heap: list[tuple[Key, _Node]] = []  # children with waiting texts; entries may be out of date
        self._queued: Key | None = None  # the entry of this node in its parent's heap that counts

    def ancestors(self) -> Iterator[_Node]:
        node: _Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def key(self) -> Key:
        """The order among siblings, the smallest first. Priorities count within a key, so not on the top level."""
        top = self.parent is not None and self.parent.parent is None
        priority = 0 if top else min(self.waiting)
        return priority, self.taken, self.deadline, self.served, self.order

    def first(self) -> _Node:
        """The child that is next; it has waiting texts."""
        while True:
            key, child = self._heap[0]
            if key != child._queued:  # replaced by a smaller one
                heapq.heappop(self._heap)
            elif not child.waiting:
                heapq.heappop(self._heap)
                child._queued = None
            elif key != (now := child.key()):  # it has grown since
                child._queued = now
                heapq.heapreplace(self._heap, (now, child))
            else:
                return child

    def changed(self) -> None:
        """Its key may have become smaller: note that with the parent."""
        if self.parent is None or not self.waiting:
            return
        key = self.key()
        if self._queued is None or key < self._queued:
            self._queued = key
            heapq.heappush(self.parent._heap, (key, self))

    def __lt__(self, other: _Node) -> bool:
        return self.order < other.order

    def count(self, priority: int, by: int) -> None:
        self.waiting[priority] = self.waiting.get(priority, 0) + by
        if not self.waiting[priority]:
            del self.waiting[priority]


class FairQueue:
    """Texts that wait or are at a replica."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._root = _Node(None, None, -1)
        self._leaves: dict[Job, _Node] = {}
        self._waiting: dict[Job, None] = {}

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def __iter__(self) -> Iterator[Job]:
        """Those that wait, in the order in which they came."""
        return iter(self._waiting)

    def __contains__(self, job: object) -> bool:
        return job in self._waiting

    def add(self, job: Job) -> None:
        """A text that waits."""
        node = self._root
        for name in (*job.share, _LEAF):
            if name not in node.children:
                node.children[name] = _Node(node, name, next(self._numbers))
            node = node.children[name]
        self._leaves[job], self._waiting[job] = node, None
        heapq.heappush(node.texts, (job.priority, next(self._numbers), job))
        if len(job.share) > 1 and node.parent is not None:  # earliest deadline first among a client's requests
            node.parent.deadline = min(node.parent.deadline, job.deadline)
        for above in node.ancestors():
            above.size += 1
            above.count(job.priority, 1)
        for above in node.ancestors():
            above.changed()

    def start(self, job: Job) -> None:
        """A waiting text goes to a replica."""
        del self._waiting[job]
        for node in self._leaves[job].ancestors():
            node.count(job.priority, -1)
            node.taken += 1
            if node.parent is not None:
                node.parent.turn = max(node.parent.turn, node.served)

    def remove(self, job: Job) -> None:
        """A text has ended, wherever it was."""
        leaf, waited = self._leaves.pop(job), job in self._waiting
        self._waiting.pop(job, None)
        for node in leaf.ancestors():
            node.size -= 1
            if waited:
                node.count(job.priority, -1)
            else:
                node.taken -= 1
            if not node.size and node.parent is not None:
                del node.parent.children[node.name]
                node.waiting, node._queued = {}, None
            else:
                node.changed()

    def serve(self, job: Job, work: float) -> None:
        """Count ``work`` (tokens) as done for a text and its owners."""
        node: _Node | None = self._leaves[job]
        while node is not None:
            node.served += work
            node = node.parent

    def next(self) -> Generator[Job, None, None]:
        """The waiting texts whose turn it is, one of each request, as if each before were taken. Nothing is changed;
        close the iterator before anything else is called."""
        passed: list[tuple[_Node, dict[int, int]]] = []
        try:
            while self._root.waiting:
                node = self._root
                while node.children:
                    node = node.first()
                while node.texts[0][2] not in self._waiting:
                    heapq.heappop(node.texts)
                hidden = dict(node.waiting)
                passed.append((node, hidden))
                for above in node.ancestors():
                    for priority, count in hidden.items():
                        above.count(priority, -count)
                    above.taken += 1
                yield node.texts[0][2]
        finally:
            for node, hidden in passed:
                for above in node.ancestors():
                    for priority, count in hidden.items():
                        above.count(priority, count)
                    above.taken -= 1
                for above in node.ancestors():
                    above.changed()

    def by_key(self) -> dict[Hashable, int]:
        """How many texts of each key wait."""
        return {name: sum(child.waiting.values()) for name, child in self._root.children.items() if name is not _LEAF}
