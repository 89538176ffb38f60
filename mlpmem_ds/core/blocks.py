"""Arithmetic of [start, stop) ranges: who owns which block, and which window of tokens predicts which
positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar, overload

import numpy as np

Item = TypeVar("Item")


class Block(NamedTuple):
    """The positions [start, stop)."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Window(NamedTuple):
    """Tokens [context_start, stop) go through the base; the positions [start, stop) are taken from the
    result."""

    context_start: int
    start: int
    stop: int


def split_blocks(total: int, size: int) -> list[Block]:
    """Cut [0, total) into blocks of `size`; the last one may be shorter. Raises ValueError for a size
    below 1."""
    if size < 1:
        raise ValueError(f"a block needs at least one position, not {size}")
    return [Block(start, min(start + size, total)) for start in range(0, total, size)]


def deal(items: Sequence[Item], rank: int, size: int) -> list[Item]:
    """The items that belong to `rank` of `size`: every size-th, so that neighbours in cost are spread."""
    return list(items[rank::size])


class WindowSequence(Sequence[Window]):
    """The windows of a stream, by arithmetic: nothing is listed, for a stream of any length. See
    `split_windows`."""

    def __init__(self, total: int, block_size: int, stride: int) -> None:
        if not 1 <= stride <= block_size:
            raise ValueError(f"a stride of {stride} does not fit in blocks of {block_size}")
        self._total, self._stride, self._length = total, stride, min(block_size, total)
        self._count = 0 if total == 0 else 1 + -(-(total - self._length) // stride)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...
    def __getitem__(self, index: int | slice) -> Window | list[Window]:
        if isinstance(index, slice):
            return [self._window(number) for number in range(self._count)[index]]
        return self._window(range(self._count)[index])

    def covering(self, block: Block) -> range:
        """The numbers of the windows that predict the positions of `block`."""
        start, stop = max(block.start, 0), min(block.stop, self._total)
        return range(self._number_of(start), self._number_of(stop - 1) + 1) if start < stop else range(0)

    @property
    def num_positions(self) -> int:
        return self._total

    def starts_of(self, positions_n: np.ndarray) -> np.ndarray:
        """The first position that the window predicts which predicts each of these, int64."""
        later_n = positions_n - self._length
        starts_n: np.ndarray = np.where(later_n < 0, 0, self._length + later_n // self._stride * self._stride)
        return starts_n

    def _window(self, number: int) -> Window:
        if number == 0:
            return Window(0, 0, self._length)
        start = self._length + (number - 1) * self._stride
        stop = min(start + self._stride, self._total)
        return Window(stop - self._length, start, stop)

    def _number_of(self, position: int) -> int:
        """The window that predicts a position."""
        return 0 if position < self._length else 1 + (position - self._length) // self._stride


def split_windows(total: int, block_size: int, stride: int) -> WindowSequence:
    """Windows of `block_size` tokens every `stride`, each position in [0, total) predicted exactly once.

    The first window predicts all its positions; each later one its last `stride`, so that they have at least
    `block_size - stride` tokens of context. The last window is moved back to be full too: every window has
    exactly min(block_size, total) tokens, so that a batch of them needs no padding and no mask.
    """
    return WindowSequence(total, block_size, stride)
