"""kNN targets on disk: read any positions, in any order, as CSR rows; what is damaged is refused. README.md
is the specification.

A sample holds one block of positions. `target_encoding` says what its arrays mean, `target_shards` how
samples become files.

Shape legend: n rows (positions) of a read, E entries of all rows, V token ids.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from mlpmem_ds.core.array_files import read_array
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import read_json
from mlpmem_ds.core.manifest import CompleteStage, Manifest, read_stage
from mlpmem_ds.core.typed_json import from_json
from mlpmem_ds.formats.target_encoding import (
    Encoding,
    unpack_block,
)
from mlpmem_ds.formats.target_shards import (
    REMEDY,
    Container,
    SampleTable,
    ShardIndex,
    TargetShard,
    fault_of_index,
    index_name,
    read_sample,
)
from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.maths.weighting import Weighting

ORDER_NAME = "frequency_order.npy"
_INDEXES_KEPT = 8192
"""tables of shards in memory, 33 kB each at most. A rank of a training reads the same part of the
positions in every window: 149 shards of 5e9 positions on 32 ranks, 745 of 2e11 on 256; ordered by block,
any of 4,769"""


@dataclass(frozen=True, kw_only=True)
class ExcludedNeighbours:
    """Which positions are no neighbours of one: those of its own document, and `window` on either side."""

    rule: Literal["none", "same-document"]
    window: int


@dataclass(frozen=True, kw_only=True)
class TargetsManifest(Manifest):
    """Targets: what was searched and how, how neighbours became distributions, and where they lie.

    `neighbour_perplexity` measured on a sample, None where it is not known; `temperature_rule` says where
    `weighting` has its temperature from; `nprobe` lists compared with a query, None where all keys were.
    """

    FORMAT: ClassVar[str] = "targets"
    VERSION: ClassVar[int] = 1

    num_positions: int
    block_size: int
    shard_positions: int
    vocab_size: int
    k: int
    weighting: Weighting
    neighbour_perplexity: float | None
    temperature_rule: Literal["auto", "fixed", "imported"]
    mass: float
    search: Literal["exact", "ivf", "imported"]
    nprobe: int | None
    exclude: ExcludedNeighbours
    encoding: Encoding
    container: Container
    entries: int
    rows_short_of_k: int
    rows_without_neighbours: int
    shards: tuple[TargetShard, ...]


@dataclass(frozen=True, kw_only=True)
class TargetAuditManifest(Manifest):
    """The stage directory of an audit of targets; its figures are in the targets' audit.json."""

    FORMAT: ClassVar[str] = "target-audit"
    VERSION: ClassVar[int] = 1


@dataclass(frozen=True, kw_only=True)
class Targets(CompleteStage[TargetsManifest]):
    """A complete target directory; shards stay on disk until asked for."""

    _tables: OrderedDict[str, SampleTable] = field(default_factory=OrderedDict, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def num_positions(self) -> int:
        return self.manifest.num_positions

    @property
    def keys_sha256(self) -> str:
        """The manifest checksum of the keys that the targets come from."""
        return self.inputs["keys"]

    @property
    def encoding(self) -> Encoding:
        return self.manifest.encoding

    @property
    def container(self) -> Container:
        return self.manifest.container

    @property
    def weighting(self) -> Weighting:
        """How the neighbours were weighted."""
        return self.manifest.weighting

    def read(self, start: int, stop: int) -> SparseRows:
        """The rows of positions [start, stop); only the samples that hold them are read.

        Raises:
            DamagedDataError: a sample is cut short or altered, or an index disagrees with its shard.
        """
        if not 0 <= start <= stop <= self.num_positions:
            raise ValueError(f"positions [{start}, {stop}) are not among {self.num_positions}")
        parts = [
            rows.rows(max(start - first, 0), min(stop - first, rows.num_rows))
            for shard in self._shards_of(start, stop)
            for first, rows in self._samples_of(shard, start, stop)
        ]
        return SparseRows.join(parts) if parts else SparseRows.empty(0).astype(np.int32, np.float32)

    def gather(self, positions_n: np.ndarray) -> SparseRows:
        """The rows of any positions, in their order, repeated ones too; a sample that holds several of them
        is read once. Raises as `read`."""
        positions_n = np.asarray(positions_n, dtype=np.int64)
        if len(positions_n) and not 0 <= positions_n.min() <= positions_n.max() < self.num_positions:
            raise ValueError(f"some positions are not among {self.num_positions}")
        distinct = np.unique(positions_n)
        size = self.manifest.block_size
        if not len(distinct):
            return self.read(0, 0)
        parts = []
        for chosen in np.split(distinct, np.flatnonzero(np.diff(distinct // size)) + 1):
            first = int(chosen[0]) // size * size
            parts.append(self.read(first, min(first + size, self.num_positions)).take(chosen - first))
        return SparseRows.join(parts).take(np.searchsorted(distinct, positions_n))

    def read_all(self) -> SparseRows:
        """Every row, after comparing each shard with its checksum."""
        for shard in self.manifest.shards:
            self.check(shard.name)
        return self.read(0, self.num_positions)

    def check(self, name: str) -> None:
        """Compare a file with its checksum.

        Raises:
            DamagedDataError: it has another.
        """
        self.check_files([name])

    @cached_property
    def order_V(self) -> np.ndarray | None:
        """The vocabulary's order of frequency, integers [V], where the encoding needs it. Raises
        DamagedDataError where it is none."""
        if self.encoding == "exact":
            return None
        self.check(ORDER_NAME)
        order_V = read_array(self.root / ORDER_NAME)
        if not np.array_equal(np.sort(order_V), np.arange(self.manifest.vocab_size)):
            raise DamagedDataError(f"{self.root / ORDER_NAME} does not name each token once; {REMEDY}")
        return order_V

    def _shards_of(self, start: int, stop: int) -> tuple[TargetShard, ...]:
        """The shards that hold some of the positions [start, stop)."""
        shards = self.manifest.shards
        if start >= stop:
            return ()
        first = bisect_right(shards, start, key=lambda shard: shard.first) - 1
        return shards[first : bisect_left(shards, stop, key=lambda shard: shard.first)]

    def _samples_of(self, shard: TargetShard, start: int, stop: int) -> Iterator[tuple[int, SparseRows]]:
        """(first position, rows) of the samples of a shard that hold some of the positions [start, stop)."""
        table, order_V = self.table_of(shard), self.order_V
        path = self.path_of(shard.name)
        with open(path, "rb", buffering=0) as stream:
            for sample in table.holding(start, stop):
                block = read_sample(path, stream, sample, container=self.container, encoding=self.encoding)
                try:
                    yield sample.first, unpack_block(block, self.encoding, order_V)
                except (ValueError, KeyError, TypeError) as error:
                    raise DamagedDataError(
                        f"{path}, sample {sample.key} is damaged ({error}); {REMEDY}"
                    ) from error

    def table_of(self, shard: TargetShard) -> SampleTable:
        """The samples of a shard. Raises DamagedDataError where its index is not whole or contradicts the
        manifest."""
        with self._lock:
            if shard.name in self._tables:
                self._tables.move_to_end(shard.name)
                return self._tables[shard.name]
        path = self.root / index_name(shard.name)
        self.check(index_name(shard.name))
        index = from_json(ShardIndex, read_json(path), where=str(path), version=TargetsManifest.VERSION)
        if fault := fault_of_index(index, shard, self.record(shard.name).bytes):
            raise DamagedDataError(f"{path}: {fault}; {REMEDY}")
        try:
            table = SampleTable.of(index, shard)
        except OverflowError as error:
            raise DamagedDataError(f"{path} is damaged ({error}); {REMEDY}") from error
        with self._lock:
            while len(self._tables) >= _INDEXES_KEPT:
                self._tables.popitem(last=False)
            self._tables[shard.name] = table
        return table


def open_targets(root: Path, *, flag: str = "--targets", has_shards: bool = True) -> Targets:
    """Open a complete target directory; without `has_shards` they may be elsewhere, and are not asked for.

    Raises:
        UserError: no targets there.
        DamagedDataError: files missing, of another size or version, or shards that do not cover the
            positions.
    """
    targets = read_stage(Targets, TargetsManifest, root, flag=flag, has_files=has_shards)
    stop = 0
    for shard in targets.manifest.shards:
        if shard.first != stop:
            raise DamagedDataError(
                f"the shards of {root} leave positions from {stop:,} out: write the targets again"
            )
        stop += shard.count
    if stop != targets.num_positions:
        raise DamagedDataError(
            f"the shards of {root} hold {stop:,} of {targets.num_positions:,} positions: write the"
            " targets again"
        )
    return targets
