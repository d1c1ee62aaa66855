"""Fair scheduling of texts that compete for slots: max-min fairness on every level of a text's path.

A path names the owner of a text, such as (key, client, request). At every level the slots are divided evenly among
those with waiting texts; a remainder goes to the least served. Texts with the same path are in first-in, first-out
order. Knows neither torch nor time.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Hashable, Iterable, Iterator
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T", bound=Hashable)
Path: TypeAlias = "tuple[Hashable, ...]"


def texts_ahead(slots: int) -> int:
    """How many texts beyond an engine's slots have their prompts read before their turn, so that a slot is refilled as
    soon as it is free. Each holds a state; the dispatcher sends as many more, whose order is then fixed."""
    return max(2, slots // 8)


class _Node:
    """A node of the tree of paths; a leaf holds texts."""

    def __init__(self, parent: _Node | None, name: Hashable, order: int):
        self.parent, self.name, self.order = parent, name, order
        self.children: dict[Hashable, _Node] = {}
        self.texts: dict[Any, int] = {}  # in the order of arrival, with its number
        # A newcomer starts level with the least served: not ahead of all others because it has had nothing yet.
        self.served: float = min((child.served for child in parent.children.values()), default=0.0) if parent else 0.0

    def ancestors(self) -> Iterator[_Node]:
        node: _Node | None = self
        while node is not None:
            yield node
            node = node.parent


_LEAF = object()  # the name of every leaf: a path may be the beginning of another


class Turns(Generic[T]):
    """All texts that run or wait, and which of them are next."""

    def __init__(self) -> None:
        self._order = itertools.count()
        self._root = _Node(None, None, next(self._order))
        self._leaves: dict[T, _Node] = {}

    def __len__(self) -> int:
        return len(self._leaves)

    def __contains__(self, text: object) -> bool:
        return text in self._leaves

    def __iter__(self) -> Iterator[T]:
        return iter(self._leaves)

    def add(self, text: T, path: Path = ()) -> None:
        """Add a text that waits for a slot."""
        assert text not in self._leaves
        node = self._root
        for name in (*path, _LEAF):
            if name not in node.children:
                node.children[name] = _Node(node, name, next(self._order))
            node = node.children[name]
        node.texts[text] = next(self._order)
        self._leaves[text] = node

    def remove(self, text: T) -> None:
        """Remove a text that has ended."""
        node = self._leaves.pop(text)
        del node.texts[text]
        while node.parent is not None and not node.texts and not node.children:
            del node.parent.children[node.name]
            node = node.parent

    def _leaves_of(self, node: _Node) -> Iterator[_Node]:
        if node.texts:
            yield node
        for child in node.children.values():
            yield from self._leaves_of(child)

    def _texts_of_leaves(self, among: Collection[T] | None) -> Iterator[tuple[_Node, Iterable[T]]]:
        """The leaves, each with its texts in the order of arrival."""
        if among is None:
            yield from ((leaf, leaf.texts) for leaf in self._leaves_of(self._root))
            return
        found: dict[_Node, list[T]] = {}
        for text in among:
            found.setdefault(self._leaves[text], []).append(text)
        for leaf, texts in found.items():
            yield leaf, sorted(texts, key=leaf.texts.__getitem__)

    def path_of(self, text: T) -> Hashable:
        """Equal for texts with the same path."""
        return self._leaves[text]

    def serve(self, text: T, amount: float) -> None:
        """Count ``amount`` (tokens) as served to ``text`` and its owners."""
        for node in self._leaves[text].ancestors():
            node.served += amount

    def next(
        self,
        count: int,
        among: Collection[T] | None = None,
        running: Iterable[T] = (),
        per_request: int | None = None,
    ) -> list[T]:
        """Up to ``count`` waiting texts for free slots, in the order of their turns.

        Args:
            among: those that may be taken; None: all. Where they are few, other texts take no time.
            running: texts that have a slot and keep it; they count towards their owners' shares.
            per_request: at most this many of one path, besides those that run.
        """
        taken: dict[_Node, int] = {}
        keeping = set(running)
        for text in keeping:
            for node in self._leaves[text].ancestors():
                taken[node] = taken.get(node, 0) + 1
        waiting: dict[_Node, list[T]] = {}
        wanted: dict[_Node, int] = {}
        most = count if per_request is None else min(count, per_request)
        for leaf, texts in self._texts_of_leaves(among):
            able = (text for text in texts if text not in keeping)
            if mine := list(itertools.islice(able, most)):
                waiting[leaf] = mine[::-1]
                for node in leaf.ancestors():
                    wanted[node] = wanted.get(node, 0) + len(mine)
        chosen: list[T] = []
        # Of each node that was come to, its children with waiting texts. Only a choice changes their order, of the
        # nodes above it alone, which are not in their parents' heaps meanwhile.
        heaps: dict[_Node, list[tuple[int, float, int, _Node]]] = {}
        while len(chosen) < count and wanted.get(self._root):
            node = self._root
            while node not in waiting:
                if node not in heaps:
                    able_nodes = (child for child in node.children.values() if wanted.get(child))
                    heaps[node] = [(taken.get(child, 0), child.served, child.order, child) for child in able_nodes]
                    heapq.heapify(heaps[node])
                node = heapq.heappop(heaps[node])[3]
            chosen.append(waiting[node].pop())
            for above in node.ancestors():
                wanted[above] -= 1
                taken[above] = taken.get(above, 0) + 1
                if above.parent is not None and wanted[above]:
                    heapq.heappush(heaps[above.parent], (taken[above], above.served, above.order, above))
        return chosen
