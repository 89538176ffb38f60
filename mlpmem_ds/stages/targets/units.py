"""The units of write_targets: what a sample shows before any row is written, and the rows of a shard.

n positions of a batch, K neighbours, V token ids.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from mlpmem_ds.core.ahead import run_ahead
from mlpmem_ds.core.blocks import Block, deal, split_blocks
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.folders import folder_of
from mlpmem_ds.core.hashing import draw_positions
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.typed_json import to_json
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.target_encoding import Encoding, TargetBlock, pack_block
from mlpmem_ds.formats.target_shards import Container, index_name, shard_name, stored_bytes, write_shard
from mlpmem_ds.maths.neighbours import Neighbours, PackedNeighbours
from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.maths.weighting import Kind, Weighting, fit_weighting, weight_perplexity
from mlpmem_ds.stages.targets.teacher import Teacher

Made = TypeVar("Made")
_Made: TypeAlias = tuple[list[TargetBlock], int, int]
"""the samples of a batch, its rows with fewer than k neighbours, its rows with none"""

SHARD_POSITIONS = 1 << 17
"""of a shard where no more shards are needed than lie well in one folder"""
_MAX_SHARD_POSITIONS = 1 << 20
_MIN_SHARDS = 1000
_SAMPLE = 1000
_SEED = 2
_MAX_WORKERS = 8  # more threads of Python get into one another's way


class UnreachablePerplexityError(UserError):
    """No temperature gives the perplexity that the flags ask for."""


@dataclass(frozen=True, kw_only=True)
class WeightingRule:
    """The weighting that the flags ask for: at a temperature, or (None) at the one that fits a perplexity."""

    kind: Kind
    temperature: float | None
    perplexity: float

    def weighting(self, squared_nK: np.ndarray, valid_nK: np.ndarray) -> Weighting:
        """The weighting for such neighbours.

        Raises:
            UnreachablePerplexityError: no temperature gives the perplexity.
        """
        if self.temperature is not None:
            return Weighting(kind=self.kind, temperature=self.temperature)
        try:
            fitted = fit_weighting(self.kind, squared_nK, valid_nK, self.perplexity)
        except ValueError as error:
            raise UnreachablePerplexityError(
                f"--neighbour-perplexity: {error}; or set --temperature (and another --output)"
            ) from error
        # Six digits: legible, and the same where another processor's exp differs in the last bit.
        return replace(fitted, temperature=float(f"{fitted.temperature:.6g}"))


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How rows are cut and stored."""

    mass: float
    encoding: Encoding
    container: Container
    dtype: np.dtype[Any]
    order_V: np.ndarray | None
    """token ids by falling frequency, with the encoding `compact`"""

    def pack(self, rows: SparseRows, first: int) -> TargetBlock:
        """Rows of consecutive positions from `first` on, as one sample."""
        return pack_block(first, rows, dtype=self.dtype, encoding=self.encoding, order_V=self.order_V)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What sampled positions show of the targets before there are any."""

    teacher: Teacher
    rule: WeightingRule
    row_format: RowFormat

    def measure(self, unit: str, writer: UnitWriter) -> dict[str, Any]:
        """The unit of the sample: the weighting, the number of positions, the perplexity of their neighbours'
        weights, and what a position will take on disk.

        Raises:
            UserError: no temperature gives the perplexity.
        """
        self.teacher.prepare()
        weighting, neighbours = self.weighting, self._neighbours
        squared_nK, valid_nK = self.teacher.squared_distances(neighbours)
        has_any_n = valid_nK.any(axis=1)
        perplexities_n = weight_perplexity(weighting.weights(squared_nK, valid_nK)[has_any_n])
        return {
            "weighting": to_json(weighting),
            "sampled_positions": len(self._positions_n),
            "neighbour_perplexity": float(np.exp(np.log(perplexities_n).mean()))
            if len(perplexities_n)
            else 1.0,
            "bytes_per_position": self.bytes_per_position(),
        }

    @cached_property
    def weighting(self) -> Weighting:
        """Fitted to the sample, or given.

        Raises:
            UserError: no temperature gives the perplexity.
        """
        return self.rule.weighting(*self.teacher.squared_distances(self._neighbours))

    def bytes_per_position(self) -> float:
        """What a position will take on disk, by packing the sampled ones (a little more than neighbouring
        ones would)."""
        total = 0
        for block in split_blocks(len(self._positions_n), self.teacher.keys.manifest.block_size):
            rows = slice(*block)
            rows_n = self.teacher.rows(
                self._neighbours.rows(rows), self._positions_n[rows], self.weighting, self.row_format.mass
            )
            total += stored_bytes(self.row_format.pack(rows_n, block.start), self.row_format.container)
        return total / len(self._positions_n)

    @cached_property
    def _positions_n(self) -> np.ndarray:
        return draw_positions(self.teacher.keys.num_positions, _SAMPLE, seed=_SEED)

    @cached_property
    def _neighbours(self) -> Neighbours:
        return self.teacher.find(self._positions_n).unpack()


def auto_shard_positions(num_positions: int) -> int:
    """Positions of a shard without `--shard-positions`: a power of two; many shards, but not millions."""
    shard = SHARD_POSITIONS
    while shard < _MAX_SHARD_POSITIONS and num_positions >= 2 * shard * _MIN_SHARDS:
        shard *= 2
    return shard


@dataclass(frozen=True, kw_only=True)
class ShardWriter:
    """Writes the rows of the shards.

    Attributes:
        call_positions: searched by all ranks together in one call; None: each rank searches by itself.
        searches_ahead: the next call is searched while rows are made of this one: where a GPU does the one
            and the host the other.
    """

    teacher: Teacher
    row_format: RowFormat
    shard_positions: int
    batch_positions: int
    weighting: Weighting
    world: World
    call_positions: int | None = None
    searches_ahead: bool = False

    @cached_property
    def shards(self) -> dict[str, Block]:
        """The positions of each shard, by its unit's name."""
        blocks = split_blocks(self.teacher.keys.num_positions, self.shard_positions)
        return {f"knn-{block.start:012d}": block for block in blocks}

    def file_of(self, shard: Block) -> str:
        """The name of its file: above 1,000 shards in a folder, a thousand a folder."""
        folder = folder_of(shard.start // self.shard_positions, len(self.shards))
        return shard_name(shard.start, shard.size, self.row_format.container, folder=folder)

    @cached_property
    def progress(self) -> Progress:
        mine = deal(list(self.shards.values()), self.world.rank, self.world.size)
        total = sum(block.size for block in mine)
        return Progress(total, label="targets", unit="positions", world=self.world)

    def write(self, unit: str, writer: UnitWriter) -> dict[str, Any]:
        """One unit: search the shard's positions batch by batch and write their rows sample by sample."""
        shard, progress, short, without = self.shards[unit], self.progress, 0, 0

        def blocks() -> Iterator[TargetBlock]:
            nonlocal short, without
            for packed, num_short, num_without in self._made(shard):
                yield from packed
                short, without = short + num_short, without + num_without
                progress.advance(sum(block.count for block in packed))

        container = self.row_format.container
        name = self.file_of(shard)
        with writer.file(name) as shard_path, writer.file(index_name(name)) as index_path:
            totals = write_shard(shard_path, index_path, blocks(), container=container)
        return {**totals, "rows_short_of_k": short, "rows_without_neighbours": without}

    def calls(self, shard: Block) -> list[Block]:
        """What is searched at once: all of a shard, or what the ranks search together."""
        return _blocks_of(shard, self.call_positions or shard.size)

    def _made(self, shard: Block) -> Iterator[_Made]:
        """The rows of a shard in order, batch by batch.

        Each thread takes a batch through aggregation and encoding by itself, and through the search where no
        other rank takes part: most of that is NumPy, which has one thread, and torch's own threads on
        matrices this small cost as much as they bring (24,576 positions, 2 threads: 4.0 s with torch's, as
        many as with one thread).
        """
        num_workers = min(torch.get_num_threads(), _MAX_WORKERS)
        block_size = self.teacher.keys.manifest.block_size
        size = block_size * max(1, self.batch_positions // num_workers // block_size)
        self.teacher.prepare()
        if self.call_positions is None:
            yield from _in_threads(self._search, _blocks_of(shard, size), num_workers)
            return
        for call, found in self._found(self.calls(shard)):
            make = partial(self._pack, found, call.start)
            yield from _in_threads(make, _blocks_of(call, size), num_workers)

    def _found(self, calls: Sequence[Block]) -> Iterator[tuple[Block, PackedNeighbours]]:
        """The neighbours of each call; `searches_ahead`: while the rows of the one before are made."""
        found = ((call, self.teacher.find(np.arange(*call))) for call in calls)
        return run_ahead(found, count=1, name="searches") if self.searches_ahead else found

    def _search(self, batch: Block) -> _Made:
        return self._pack(self.teacher.find(np.arange(*batch)), batch.start, batch)

    def _pack(self, found: PackedNeighbours, first: int, batch: Block) -> _Made:
        """The rows of a batch; `found` begins with the position `first`."""
        counts_n = found.count(slice(batch.start - first, batch.stop - first))
        blocks = []
        for block in _blocks_of(batch, self.teacher.keys.manifest.block_size):
            neighbours = found.rows(slice(block.start - first, block.stop - first))
            rows = self.teacher.rows(neighbours, np.arange(*block), self.weighting, self.row_format.mass)
            blocks.append(self.row_format.pack(rows, block.start))
        return blocks, int((counts_n < self.teacher.k).sum()), int((counts_n == 0).sum())


def _blocks_of(block: Block, size: int) -> list[Block]:
    """A range of positions in ranges of this size, the last one smaller."""
    return [
        Block(block.start + part.start, block.start + part.stop) for part in split_blocks(block.size, size)
    ]


def _in_threads(make: Callable[[Block], Made], batches: Sequence[Block], num_workers: int) -> Iterator[Made]:
    """`make` of each batch in order, at most `num_workers` at work or waiting to be written; torch's threads
    are shared out."""
    if num_workers == 1:
        yield from map(make, batches)
        return
    num_threads = torch.get_num_threads()
    share = max(1, num_threads // num_workers)
    pending: deque[Future[Made]] = deque()
    try:
        torch.set_num_threads(share)
        with ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            try:
                for batch in batches:
                    pending.append(pool.submit(make, batch))
                    if len(pending) > num_workers:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        torch.set_num_threads(num_threads)
