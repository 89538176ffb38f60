"""One rank, or ranks that exchange nothing: each does its own work, and they share a file system at most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mlpmem_ds.engines.collectives.ranks import Array, Ranks


class Alone(Ranks):
    """A world of one."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._counters: Counter[str] = Counter()

    def sum(self, array: Array) -> Array:
        return array.copy()

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def exchange(self, parts: Sequence[Array]) -> list[Array]:
        (part,) = parts
        return [part]

    def next_number(self, counter: str) -> int:
        self._counters[counter] += 1
        return self._counters[counter] - 1

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass

    def fail(self, error: BaseException | None = None) -> None:
        pass
