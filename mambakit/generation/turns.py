"""Turns between texts that want the same slots: fair between keys, then between clients, requests, or whatever a text's path names.

Knows neither torch nor time. A text has a path, such as (key, client, request). At every level slots are divided evenly among
those who want them (max-min fairness), and where they do not come out even, the least served is next. Texts with the same
path are in the order in which they came.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T", bound=Hashable)
Path: TypeAlias = "tuple[Hashable, ...]"


class _Node:
    """Those whose paths begin alike; a leaf holds texts."""

    def __init__(self, parent: _Node | None, name: Hashable, order: int):
        self.parent, self.name, self.order = parent, name, order
        self.children: dict[Hashable, _Node] = {}
        self.texts: dict[Any, None] = {}  # in the order in which they came
        # Who comes later starts level with the least served: neither ahead of everybody for having had nothing, nor behind.
        self.served: float = min((child.served for child in parent.children.values()), default=0.0) if parent else 0.0

    def line(self) -> Iterator[_Node]:
        node: _Node | None = self
        while node is not None:
            yield node
            node = node.parent


_LEAF = object()  # the name of every leaf: a path may be the beginning of another


class Turns(Generic[T]):
    """All texts that run or wait, and whose turn it is."""

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
        """A text that wants a slot."""
        assert text not in self._leaves
        node = self._root
        for name in (*path, _LEAF):
            if name not in node.children:
                node.children[name] = _Node(node, name, next(self._order))
            node = node.children[name]
        node.texts[text] = None
        self._leaves[text] = node

    def remove(self, text: T) -> None:
        """It has ended."""
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

    def serve(self, text: T, amount: float) -> None:
        """It had so much of what all want."""
        for node in self._leaves[text].line():
            node.served += amount

    def next(
        self, count: int, among: Callable[[T], bool], running: Iterable[T] = (), per_request: int | None = None
    ) -> list[T]:
        """Up to ``count`` texts ``among`` those that wait, for slots that are to be given away.

        Args:
            running: texts that have a slot and keep it; they count as their paths' part.
            per_request: of one path at most, besides those that run.
        """
        taken: dict[_Node, int] = {}
        keeping = set(running)
        for text in keeping:
            for node in self._leaves[text].line():
                taken[node] = taken.get(node, 0) + 1
        waiting: dict[_Node, list[T]] = {}
        wanted: dict[_Node, int] = {}
        for leaf in self._leaves_of(self._root):
            most = count if per_request is None else min(count, per_request)
            able = (text for text in leaf.texts if text not in keeping and among(text))
            if mine := list(itertools.islice(able, most)):
                waiting[leaf] = mine[::-1]
                for node in leaf.line():
                    wanted[node] = wanted.get(node, 0) + len(mine)
        chosen: list[T] = []
        while len(chosen) < count and wanted.get(self._root):
            node = self._root
            while node not in waiting:
                able = (child for child in node.children.values() if wanted.get(child))
                node = min(able, key=lambda child: (taken.get(child, 0), child.served, child.order))
            chosen.append(waiting[node].pop())
            for above in node.line():
                wanted[above] -= 1
                taken[above] = taken.get(above, 0) + 1
        return chosen


def within_share(path: Path, taken: Iterable[Path], capacity: float, count: int = 1) -> bool:
    """Whether ``count`` texts more, beside those ``taken``, leave ``path`` within its even share of ``capacity``.

    At every level the share is divided among those who have anything there. Others may have more than theirs: that is not the
    newcomer's fault. So what is taken in all stays below ``capacity`` times the logarithm of how many paths there are.
    """
    paths, share = list(taken), float(capacity)
    for level, name in enumerate(path):
        share /= len({other[level] for other in paths if len(other) > level} | {name})
        paths = [other for other in paths if len(other) > level and other[level] == name]
    return len(paths) + count <= share
