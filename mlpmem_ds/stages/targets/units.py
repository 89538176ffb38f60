"""The units of write_targets: what a sample shows before anything is written, and the rows of a shard.

n positions of a batch, K neighbours, V token ids.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block, split_blocks
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.hashing import sample_positions
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.stage_directory import UnitWriter
from mlpmem_ds.core.typed_json import to_json
from mlpmem_ds.formats.corpus import token_dtype
from mlpmem_ds.formats.target_encoding import TargetBlock, pack_block
from mlpmem_ds.formats.target_shards import index_name, shard_name, stored_bytes, write_shard
from mlpmem_ds.maths.knn import Neighbours
from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.maths.weighting import Weighting, fit_weighting, weight_perplexity
from mlpmem_ds.stages.targets.config import Config
from mlpmem_ds.stages.targets.teacher import Teacher

Made = TypeVar("Made")

_SAMPLE = 1000
_SEED = 2
_MAX_WORKERS = 8  # more threads of Python get into one another's way


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the sample shows: its positions, their neighbours, the weighting, and the summary that the unit
    keeps."""

    positions_n: np.ndarray
    neighbours: Neighbours
    weighting: Weighting
    summary: dict[str, Any]


def measure(teacher: Teacher, config: Config) -> Measured:
    """Fit or take the temperature, and measure the neighbour-weight perplexity, on sampled positions.

    Raises:
        UserError: no temperature gives the requested perplexity.
    """
    positions_n = sample_positions(teacher.keys.num_positions, _SAMPLE, seed=_SEED)
    neighbours = teacher.find(positions_n).unpack()
    squared_nK, valid_nK = teacher.squared_distances(neighbours)
    if config.temperature == "auto":
        try:
            weighting = fit_weighting(config.weighting, squared_nK, valid_nK, config.perplexity)
        except ValueError as error:
            raise UserError(
                f"--neighbour-perplexity: {error}; or set --temperature (and another --output)"
            ) from error
        # Six digits: legible, and the same where another processor's exp differs in the last bit.
        weighting = replace(weighting, temperature=float(f"{weighting.temperature:.6g}"))
    else:
        weighting = Weighting(kind=config.weighting, temperature=float(config.temperature))
    found_n = valid_nK.any(axis=1)
    perplexities_n = weight_perplexity(weighting.weights(squared_nK, valid_nK)[found_n])
    summary = {
        "weighting": to_json(weighting),
        "sampled_positions": len(positions_n),
        "neighbour_perplexity": float(np.exp(np.log(perplexities_n).mean())) if found_n.any() else 1.0,
    }
    return Measured(positions_n=positions_n, neighbours=neighbours, weighting=weighting, summary=summary)


def bytes_per_position(
    teacher: Teacher, config: Config, measured: Measured, order_V: np.ndarray | None
) -> float:
    """What a position will take on disk, by packing the sampled ones (a little more than neighbouring ones
    would)."""
    total = 0
    for block in split_blocks(len(measured.positions_n), teacher.keys.manifest.block_size):
        rows = teacher.rows(
            _part(measured.neighbours, block),
            measured.positions_n[slice(*block)],
            measured.weighting,
            config.mass,
        )
        total += stored_bytes(_pack(teacher, config, block.start, rows, order_V), config.container)
    return total / len(measured.positions_n)


def write(
    teacher: Teacher,
    config: Config,
    shard: Block,
    weighting: Weighting,
    order_V: np.ndarray | None,
    writer: UnitWriter,
    progress: Progress,
) -> dict[str, Any]:
    """One unit: search the shard's positions batch by batch and write their rows sample by sample.

    Each thread takes a batch through search, aggregation and encoding by itself: most of that is NumPy, which
    has one thread, and torch's own threads on matrices this small cost as much as they bring (24,576
    positions, 2 threads: 4.0 s with torch's, as many as with one thread).
    """
    short = without = 0
    block_size = teacher.keys.manifest.block_size
    num_threads = torch.get_num_threads()
    num_workers = min(num_threads, _MAX_WORKERS)
    teacher.prepare()
    size = block_size * max(1, config.batch_positions // num_workers // block_size)

    def make(batch: Block) -> tuple[list[TargetBlock], int, int]:
        first = shard.start + batch.start
        found = teacher.find(np.arange(first, first + batch.size))
        counts_n = found.count()
        blocks = []
        for block in split_blocks(batch.size, block_size):
            positions_n = np.arange(first + block.start, first + block.stop)
            rows = teacher.rows(found.rows(slice(*block)), positions_n, weighting, config.mass)
            blocks.append(_pack(teacher, config, int(positions_n[0]), rows, order_V))
        return blocks, int((counts_n < config.k).sum()), int((counts_n == 0).sum())

    def blocks() -> Iterator[TargetBlock]:
        nonlocal short, without
        batches = split_blocks(shard.size, size)
        for batch, (made, num_short, num_without) in zip(
            batches, _in_threads(make, batches, num_workers), strict=True
        ):
            yield from made
            short, without = short + num_short, without + num_without
            progress.advance(batch.size)

    name = shard_name(shard.start, shard.size, config.container)
    with writer.file(name) as shard_path, writer.file(index_name(name)) as index_path:
        totals = write_shard(shard_path, index_path, blocks(), container=config.container)
    return {**totals, "rows_short_of_k": short, "rows_without_neighbours": without}


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


def _part(neighbours: Neighbours, block: Block) -> Neighbours:
    return Neighbours(
        ids_QK=neighbours.ids_QK[slice(*block)], distances_QK=neighbours.distances_QK[slice(*block)]
    )


def _pack(
    teacher: Teacher,
    config: Config,
    first: int,
    rows: SparseRows,
    order_V: np.ndarray | None,
) -> TargetBlock:
    dtype = token_dtype(teacher.keys.manifest.vocab_size)
    return pack_block(first, rows, dtype=dtype, encoding=config.encoding, order_V=order_V)
