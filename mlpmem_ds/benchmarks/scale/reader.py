"""Benchmark `scale`, measures of the training reader: rows read, the order of an epoch, memory."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.benchmarks.scale.measure import Measure
from mlpmem_ds.core.blocks import Block, split_blocks
from mlpmem_ds.core.file_lists import list_files
from mlpmem_ds.core.files import FileRecord, canonical_json, publish_json, record_file
from mlpmem_ds.core.typed_json import to_json
from mlpmem_ds.formats.target_shards import (
    ShardIndex,
    StoredSample,
    TargetShard,
    index_name,
    sample_key,
    shard_name,
)
from mlpmem_ds.formats.targets import ExcludedNeighbours, Targets, TargetsManifest, open_targets
from mlpmem_ds.formats.training_order import TrainingOrder
from mlpmem_ds.formats.training_windows import Source, Windows
from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.maths.weighting import Weighting

_BLOCK, _WINDOW_BLOCKS = 1024, 1024
_SHARD_POSITIONS, _SAMPLE_BYTES = 1 << 20, 256 * 1024
_VISITED = 200  # shards whose indexes are read, more than are kept


class _Keys:
    """Keys without content."""

    def read(self, array: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        assert stop is not None
        return np.zeros(stop - start, np.uint16)

    def read_inputs(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        raise AssertionError("inputs are read by row, when a batch is put together")

    def gather_inputs(self, positions_n: np.ndarray) -> np.ndarray:
        raise AssertionError("no batch is put together here")

    def read_inputs_ahead(self, start: int, stop: int) -> None:
        """Only a hint."""


class _Targets:
    """Targets without content, which count the rows that are read."""

    def __init__(self) -> None:
        self.num_read = 0

    def read(self, start: int, stop: int) -> SparseRows:
        self.num_read += stop - start
        return SparseRows.empty(stop - start)


def rows_read_per_row_used(
    work: Path, *, size: int, batch_positions: int, num_windows: int = 4, ranks: int = 3
) -> float:
    """Rows of targets that some of the ranks decode, for each row that they train on."""
    order = TrainingOrder(
        num_positions=num_windows * _WINDOW_BLOCKS * _BLOCK,
        block_size=_BLOCK,
        window_blocks=_WINDOW_BLOCKS,
        seed=0,
    )
    num_used, num_read = 0, 0
    for rank in np.linspace(0, size - 1, ranks).astype(int).tolist():
        targets = _Targets()
        source = Source(
            keys=_Keys(),
            targets=targets,
            with_log_probabilities=False,
            num_positions=order.num_positions,
            block_size=_BLOCK,
        )
        with ThreadPoolExecutor(2) as pool:
            windows = Windows(source, order, rank=rank, size=size, stop=order.num_positions, pool=pool)
            for batch in range(order.num_positions // batch_positions):
                shares = order.shares(batch, batch_positions, rank=rank, size=size)
                num_used += len(windows.gather(shares).values_n)
        num_read += targets.num_read
    return num_read / num_used


def order_seconds(work: Path, *, num_positions: int) -> float:
    """CPU seconds for the positions of 100 blocks of an epoch, from nothing, by block."""
    start = time.process_time()
    order = TrainingOrder(
        num_positions=num_positions, block_size=_BLOCK, window_blocks=_WINDOW_BLOCKS, seed=0, by_block=True
    )
    middle = num_positions // 2
    order.positions(middle, middle + 100 * _BLOCK)
    return time.process_time() - start


def reader_bytes(work: Path, *, num_positions: int = 2 * 10**11) -> float:
    """Peak of a rank's memory for what it knows of the targets and of the order: the directory opened, 200
    indexes of shards read, a window of the order made. No decoded target is in it."""
    write_geometry(work / "targets", num_positions)
    tracemalloc.start()
    try:
        targets = open_targets(work / "targets")
        for shard in visited(targets):
            targets.table_of(shard)
        order = TrainingOrder(
            num_positions=num_positions, block_size=_BLOCK, window_blocks=_WINDOW_BLOCKS, seed=0
        )
        order.shares(3, _WINDOW_BLOCKS * _BLOCK, rank=1, size=256)
        return float(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def visited(targets: Targets) -> list[TargetShard]:
    """The shards whose indexes exist."""
    shards = targets.manifest.shards
    return list(shards[:: max(1, len(shards) // _VISITED)])


def write_geometry(root: Path, num_positions: int) -> None:
    """A directory of targets of this many positions, by its manifest: of its files only those exist that
    `reader_bytes` reads, the shards as holes."""
    root.mkdir()
    blocks = split_blocks(num_positions, _SHARD_POSITIONS)
    step = max(1, len(blocks) // _VISITED)
    shards = []
    records = []
    for number, block in enumerate(blocks):
        name = shard_name(block.start, block.size)
        num_samples = -(-block.size // _BLOCK)
        size = num_samples * _SAMPLE_BYTES + 1
        shards.append(
            TargetShard(name=name, first=block.start, count=block.size, entries=0, samples=num_samples)
        )
        records.append(FileRecord(name=name, bytes=size, sha256="0" * 64))
        if number % step:
            records.append(FileRecord(name=index_name(name), bytes=1, sha256="0" * 64))
        else:
            (root / index_name(name)).write_bytes(canonical_json(to_json(_index(block))))
            records.append(record_file(root, index_name(name)))
    files = list_files(root, records)
    for record in _sampled(records):  # what `open_targets` asks for
        with open(root / record.name, "ab") as stream:
            stream.truncate(record.bytes)
    publish_json(root / "manifest.json", _manifest(num_positions, shards) | files, seal=True)


def _sampled(records: list[FileRecord]) -> Iterator[FileRecord]:
    """The first and the last of every list of 1,000: those that exist are as they are."""
    ordered = sorted(records, key=lambda record: record.name)
    for block in split_blocks(len(ordered), 1000):
        yield from (ordered[block.start], ordered[block.stop - 1])


def _index(block: Block) -> ShardIndex:
    samples = [
        StoredSample(
            key=sample_key(part.start + block.start),
            first=part.start + block.start,
            count=part.size,
            offset=number * _SAMPLE_BYTES,
            compressed_bytes=_SAMPLE_BYTES,
            bytes=1 << 20,
            entries=0,
        )
        for number, part in enumerate(split_blocks(block.size, _BLOCK))
    ]
    return ShardIndex(samples=tuple(samples), end_offset=len(samples) * _SAMPLE_BYTES)


def _manifest(num_positions: int, shards: list[TargetShard]) -> dict[str, Any]:
    manifest = TargetsManifest(
        num_positions=num_positions,
        block_size=_BLOCK,
        shard_positions=_SHARD_POSITIONS,
        vocab_size=128_256,
        k=1024,
        weighting=Weighting(kind="softmax", temperature=1.0),
        neighbour_perplexity=None,
        temperature_rule="fixed",
        mass=1.0,
        search="exact",
        nprobe=None,
        exclude=ExcludedNeighbours(rule="none", window=0),
        encoding="exact",
        container="tar.zst",
        entries=0,
        rows_short_of_k=0,
        rows_without_neighbours=0,
        shards=tuple(shards),
    )
    header = {
        "format": f"mlpmem-{TargetsManifest.FORMAT}",
        "version": TargetsManifest.VERSION,
        "inputs": {"keys": "0" * 64},
        "config": {},
    }
    return header | manifest.to_json()


def _measure_rows(size: int, batch_positions: int) -> Measure:
    return Measure(
        name=f"rows_read_per_row_used_w{size}",
        function=partial(rows_read_per_row_used, size=size, batch_positions=batch_positions),
        goal=1.1,
        direction="at most",
        meaning=(
            f"rows of targets that a rank of {size} decodes for each that it trains on, 4 windows of 1,024"
            f" blocks of 1,024, batches of {batch_positions:,}"
        ),
    )


def _measure_order(name: str, num_positions: int) -> Measure:
    return Measure(
        name=f"order_seconds_{name}",
        function=partial(order_seconds, num_positions=num_positions),
        goal=1,
        direction="at most",
        meaning=f"CPU seconds for the positions of 100 blocks at {name} positions, from nothing",
    )


MEASURES: tuple[Measure, ...] = (
    _measure_rows(8, 1 << 18),
    _measure_rows(32, 1 << 18),
    _measure_rows(256, 1 << 20),
    _measure_order("5e9", 5 * 10**9),
    _measure_order("2e11", 2 * 10**11),
    Measure(
        name="reader_bytes_2e11",
        function=reader_bytes,
        goal=1e9,
        direction="at most",
        meaning=(
            "peak bytes of what a rank knows of targets and order at 2e11 positions (shards of 2^20):"
            " manifest, 200 indexes read, a window"
        ),
    ),
)
