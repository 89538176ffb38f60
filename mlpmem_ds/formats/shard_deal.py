"""Whole shards dealt to ranks, and what of them has been read: the state of a training that streams.

The shards of all epochs form one sequence: number i is, in the permutation of epoch i // S, the shard at
place i mod S. What is left of the sequence, those that were begun and then all that were not, is dealt to the
ranks in turn, and so is a rank's part to the shards that it has open at a time. So any number of ranks can go
on where others stopped, and reads no row of an epoch that has been read.

A shard's rows come in groups, numbered through its blocks; a mask has a bit for each group that was read.

S shards of an epoch, W ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mlpmem_ds.core.hashing import Permutation

ROWS_OF_GROUP = 64
"""rows of one block that travel together: few enough to mix blocks, enough to cost little"""


@dataclass(frozen=True, kw_only=True)
class Left:
    """A shard of the sequence that is not read to its end; `mask` of the groups that were."""

    number: int
    mask: int = 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rank has read: it has opened its places before `next_place`, which is one of its own, and those
    in `open` are not read to their end; `open` by place, with their masks."""

    next_place: int
    open: Mapping[int, int]


@dataclass(frozen=True, kw_only=True)
class ShardDeal:
    """What is left: `left`, ascending, and all of the sequence from `horizon` on."""

    horizon: int = 0
    left: tuple[Left, ...] = ()

    def at(self, place: int) -> Left:
        """The shard at a place of what is left; rank r of W reads the places r, r + W, …"""
        if place < len(self.left):
            return self.left[place]
        return Left(number=self.horizon + place - len(self.left))

    def after(self, reports: Sequence[Report]) -> ShardDeal:
        """What is left after each rank has read what it reports, in rank order."""
        size = len(reports)
        end = max([len(self.left), *(report.next_place - size + 1 for report in reports)])
        places = {place: mask for report in reports for place, mask in report.open.items()}
        for report in reports:
            for place in range(report.next_place, end, size):
                places[place] = self.at(place).mask
        masks = {self.at(place).number: mask for place, mask in places.items()}
        horizon = self.horizon + end - len(self.left)
        while masks.get(horizon - 1) == 0:  # opened ahead, and nothing of it trained on
            horizon -= 1
            del masks[horizon]
        return ShardDeal(
            horizon=horizon, left=tuple(Left(number=number, mask=masks[number]) for number in sorted(masks))
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; masks as hexadecimal numbers."""
        return {"horizon": self.horizon, "left": [[shard.number, f"{shard.mask:x}"] for shard in self.left]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ShardDeal:
        left = tuple(Left(number=number, mask=int(mask, 16)) for number, mask in values["left"])
        return cls(horizon=values["horizon"], left=left)


@dataclass(frozen=True, kw_only=True)
class ShardSequence:
    """Which shard of which epoch stands at a number."""

    num_shards: int
    seed: int

    def at(self, number: int) -> tuple[int, int]:
        """(epoch, shard)."""
        epoch, place = divmod(number, self.num_shards)
        return epoch, int(_permutation(self.num_shards, self.seed, epoch).items(place, place + 1)[0])


@lru_cache(maxsize=4)
def _permutation(num_shards: int, seed: int, epoch: int) -> Permutation:
    return Permutation(num_shards, seed, epoch, 0)


def num_groups(count: int, block_size: int) -> int:
    """Groups of a shard of `count` rows in blocks of `block_size`, of which the last may be shorter."""
    return count // block_size * groups_of_block(block_size) + groups_of_block(count % block_size)


def groups_of_block(rows: int) -> int:
    """Groups of a block of so many rows."""
    return -(-rows // ROWS_OF_GROUP)


def rows_left(count: int, block_size: int, mask: int) -> list[int]:
    """Rows whose groups are not in the mask, of each block of a shard of `count` rows that has any."""
    rows, number = [], 0
    for start in range(0, count, block_size):
        size = min(block_size, count - start)
        left = size
        for at in range(0, size, ROWS_OF_GROUP) if mask else ():
            left -= min(ROWS_OF_GROUP, size - at) * (mask >> number & 1)
            number += 1
        rows.append(left)
    return [size for size in rows if size]


def blocks_to_read(readers: Sequence[Iterator[Sequence[int]]], rows: int) -> list[int]:
    """How many blocks each reader gives until there are so many rows, where they give one in turn.

    A reader at the end of a shard begins no other while the shards that are open hold rows enough.

    Args:
        readers: of each the shards that it reads, one after another: the rows of their blocks.
    """
    counts, open_shards = [0] * len(readers), [deque[int]() for _ in readers]
    rows_open = 0
    while rows > 0:
        for reader, shards in enumerate(readers):
            while not open_shards[reader] and rows_open < rows:
                open_shards[reader].extend(next(shards))
                rows_open += sum(open_shards[reader])
            if rows > 0 and open_shards[reader]:
                size = open_shards[reader].popleft()
                counts[reader] += 1
                rows_open -= size
                rows -= size
    return counts


def mask_of(groups: Iterable[int]) -> int:
    """The mask that has these groups."""
    mask = 0
    for group in groups:
        mask |= 1 << group
    return mask
