"""Arithmetic of [start, stop) ranges: who owns which block, and which window of tokens predicts which positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Block(NamedTuple):
    """The positions [start, stop)."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Window(NamedTuple):
    """Tokens [context_start, stop) go through the base; the positions [start, stop) are taken from the result."""

    context_start: int
    start: int
    stop: int


def split_blocks(total: int, size: int) -> list[Block]:
    """Cut [0, total) into blocks of `size`; the last one may be shorter."""
    if size < 1:
        raise ValueError(f"a block needs at least one position, not {size}")
    return [Block(start, min(start + size, total)) for start in range(0, total, size)]


def deal(items: Sequence[Item], rank: int, size: int) -> list[Item]:
    """The items that belong to `rank` of `size`: every size-th, so that neighbours in cost are spread."""
    return list(items[rank::size])


def split_windows(total: int, block_size: int, stride: int) -> list[Window]:
    """Windows of `block_size` tokens every `stride`, each position in [0, total) predicted exactly once.

    The first window predicts all its positions; each later one its last `stride`, so that they have at least
    `block_size - stride` tokens of context. The last window is moved back to be full too: every window has
    exactly min(block_size, total) tokens, so that a batch of them needs no padding and no mask.
    """
    if not 1 <= stride <= block_size:
        raise ValueError(f"a stride of {stride} does not fit in blocks of {block_size}")
    if total == 0:
        return []
    length = min(block_size, total)
    windows = [Window(0, 0, length)]
    while windows[-1].stop < total:
        start = windows[-1].stop
        stop = min(start + stride, total)
        windows.append(Window(stop - length, start, stop))
    return windows
