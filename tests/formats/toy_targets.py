"""A small directory of targets from random rows, in any encoding and container."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.core.blocks import split_blocks
from mlpmem_ds.core.config import Flags
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.target_encoding import Encoding, pack_block
from mlpmem_ds.formats.target_shards import Container, TargetShard, index_name, shard_name, write_shard
from mlpmem_ds.formats.targets import ORDER_NAME, TargetsManifest
from mlpmem_ds.maths.sparse_rows import SparseRows

from ..manifests import targets_manifest

NUM_POSITIONS, BLOCK_SIZE, SHARD_POSITIONS, VOCAB_SIZE = 117, 8, 40, 70_000


def source() -> tuple[list[dict[int, float]], np.ndarray]:
    """Rows of (id → probability), some empty, and their dropped mass."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(NUM_POSITIONS):
        ids = np.sort(generator.choice(VOCAB_SIZE, generator.integers(0, 9), replace=False))
        weights = generator.random(len(ids))
        rows.append(dict(zip(ids.tolist(), (weights / max(weights.sum(), 1e-9) * 0.9).tolist(), strict=True)))
    return rows, np.array([0.1 if row else 0.0 for row in rows])


def sparse(rows: list[dict[int, float]], dropped: np.ndarray | None = None) -> SparseRows:
    return SparseRows.from_counts(
        np.array([len(row) for row in rows]),
        np.array([token for row in rows for token in row], np.int64),
        np.array([probability for row in rows for probability in row.values()]),
        dropped,
    )


def order() -> np.ndarray:
    """A vocabulary's order in which no token is at its own place."""
    return np.roll(np.arange(VOCAB_SIZE), 7).astype("<u4")


def write_targets(root: Path, encoding: Encoding = "exact", container: Container = "tar.zst") -> Path:
    rows, dropped = source()
    shards = {f"knn-{block.start}": block for block in split_blocks(NUM_POSITIONS, SHARD_POSITIONS)}
    stage = open_stage(
        root,
        stage=TargetsManifest.FORMAT,
        version=TargetsManifest.VERSION,
        config=Flags(),
        inputs={"keys": "0" * 64},
        world=World(),
    )

    def write(unit: str, writer: UnitWriter) -> dict[str, int]:
        start, stop = shards[unit]
        blocks = [
            pack_block(
                start + part.start,
                sparse(
                    rows[start + part.start : start + part.stop],
                    dropped[start + part.start : start + part.stop],
                ),
                dtype=np.dtype("<u4"),
                encoding=encoding,
                order_V=order(),
            )
            for part in split_blocks(stop - start, BLOCK_SIZE)
        ]
        name = shard_name(start, stop - start, container)
        with writer.file(name) as shard_path, writer.file(index_name(name)) as index_path:
            return write_shard(shard_path, index_path, blocks, container=container)

    def describe() -> TargetsManifest:
        return targets_manifest(
            num_positions=NUM_POSITIONS,
            vocab_size=VOCAB_SIZE,
            block_size=BLOCK_SIZE,
            encoding=encoding,
            container=container,
            shards=tuple(
                TargetShard(
                    name=shard_name(block.start, block.size, container),
                    first=block.start,
                    count=block.size,
                    **summary,
                )
                for block, summary in zip(shards.values(), stage.summaries(list(shards)), strict=True)
            ),
        )

    stage.run_units(list(shards), write)
    units = list(shards)
    if encoding == "compact":
        stage.run_units(["order"], lambda unit, writer: writer.array(ORDER_NAME, order()))
        units.append("order")
    stage.complete(units, describe)
    return root


def expect_rows(found: Any, start: int, stop: int, kind: tuple[Encoding, Container]) -> None:
    rows, dropped = source()
    expected = sparse(rows[start:stop])
    assert np.array_equal(found.offsets, expected.offsets) and np.array_equal(found.ids, expected.ids)
    if kind[0] == "exact":
        assert np.array_equal(
            found.probabilities, expected.probabilities.astype(np.float16).astype(np.float32)
        )
        assert np.array_equal(found.dropped, dropped[start:stop].astype(np.float16).astype(np.float32))
        return
    assert np.allclose(found.dropped, dropped[start:stop], rtol=1e-6)
    row_of_entry = np.repeat(np.arange(stop - start), np.diff(expected.offsets))
    sums = np.bincount(row_of_entry, weights=found.probabilities, minlength=stop - start)
    assert np.allclose(sums + found.dropped, [bool(row) for row in rows[start:stop]], atol=1e-6)
    # A level is off by half at most, 256 steps are the fewest that a block has, and the lowest level is 1.
    bound = 0.75 * np.cbrt(expected.probabilities) / 256 + 0.02 * expected.probabilities + 256**-1.5
    assert (np.abs(found.probabilities - expected.probabilities) < bound).all()
