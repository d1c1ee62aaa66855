"""How many texts each owner has somewhere, and whether one more would be within its even share."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

Path = tuple[Hashable, ...]


class Shares:
    """Counts texts by their paths, such as (key, client, request)."""

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._counts: dict[Path, int] = {}  # of every beginning of a path
        self._children: dict[Path, dict[Hashable, int]] = {}
        for path in paths:
            self.add(path)

    def __len__(self) -> int:
        return self._counts.get((), 0)

    def __contains__(self, path: Path) -> bool:
        return path in self._counts

    def add(self, path: Path) -> None:
        self._change(path, 1)

    def remove(self, path: Path) -> None:
        self._change(path, -1)

    def _change(self, path: Path, by: int) -> None:
        for level in range(len(path) + 1):
            above = path[:level]
            self._counts[above] = self._counts.get(above, 0) + by
            if not self._counts[above]:
                del self._counts[above]
            if level < len(path):
                children = self._children.setdefault(above, {})
                children[path[level]] = children.get(path[level], 0) + by
                if not children[path[level]]:
                    del children[path[level]]
                if not children:
                    del self._children[above]

    def fits(self, path: Path, capacity: float, count: int = 1) -> bool:
        """Whether ``path`` stays within its even share of ``capacity`` with ``count`` texts more.

        At every level the share is divided among the owners that have texts there. Others may hold more than their
        share, which must not keep a newcomer out; so the total stays below ``capacity`` times the logarithm of the
        number of paths.
        """
        share = float(capacity)
        for level, name in enumerate(path):
            children = self._children.get(path[:level], {})
            share /= len(children) + (name not in children)
        return self._counts.get(path, 0) + count <= share
