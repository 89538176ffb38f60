"""Targets in both encodings and containers: any range and order is read, other versions are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import publish_json, read_json
from mlpmem_ds.formats import targets as targets_module
from mlpmem_ds.formats.target_encoding import Encoding, pack_block
from mlpmem_ds.formats.target_shards import (
    Container,
    SampleTable,
    ShardIndex,
    StoredSample,
    TargetShard,
    index_name,
    sample_key,
)
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.formats.training_order import TrainingOrder

from .toy_targets import BLOCK_SIZE, NUM_POSITIONS, expect_rows, sparse, write_targets


def test_any_range_is_read(targets_dir: Path, target_kind: tuple[Encoding, Container]) -> None:
    targets = open_targets(targets_dir)
    for start, stop in (
        (0, NUM_POSITIONS),
        (0, 0),
        (117, 117),
        (3, 4),
        (7, 9),
        (38, 43),
        (40, 80),
        (79, 117),
        (5, 116),
    ):
        expect_rows(targets.read(start, stop), start, stop, target_kind)
    expect_rows(targets.read_all(), 0, NUM_POSITIONS, target_kind)
    found = targets.read(3, 9)
    assert [array.dtype for array in (found.offsets, found.ids, found.probabilities, found.dropped)] == [
        np.int64,
        np.int32,
        np.float32,
        np.float32,
    ]
    for start, stop in ((-1, 3), (5, 4), (0, NUM_POSITIONS + 1)):
        with pytest.raises(ValueError, match="are not among 117"):
            targets.read(start, stop)


def test_any_order_of_positions_is_read(targets_dir: Path) -> None:
    targets = open_targets(targets_dir)
    whole = targets.read_all()
    generator = np.random.default_rng(5)
    for positions in (
        generator.integers(0, NUM_POSITIONS, 300),
        np.array([116, 0, 39, 40]),
        np.array([], np.int64),
    ):
        found, expected = targets.gather(positions), [whole.dropped[positions]]
        for row, position in enumerate(positions):
            here = slice(found.offsets[row], found.offsets[row + 1])
            there = slice(whole.offsets[position], whole.offsets[position + 1])
            assert np.array_equal(found.ids[here], whole.ids[there])
            assert np.array_equal(found.probabilities[here], whole.probabilities[there])
        assert np.array_equal(found.dropped, expected[0]) and len(found.offsets) == len(positions) + 1
    for positions in ([-1], [0, NUM_POSITIONS]):
        with pytest.raises(ValueError, match="not among 117"):
            targets.gather(np.array(positions))


def test_the_index_of_a_shard_is_read_once(targets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a training comes back to it: reading it costs more than decoding a sample."""
    targets, paths = open_targets(targets_dir), list[Path]()

    def counted(path: Path) -> Any:
        paths.append(path)
        return read_json(path)

    monkeypatch.setattr(targets_module, "read_json", counted)
    for _ in range(3):
        for start in range(0, NUM_POSITIONS, BLOCK_SIZE):
            targets.read(start, min(start + BLOCK_SIZE, NUM_POSITIONS))
    assert len(paths) == len(set(paths)) == len(targets.manifest.shards) == 3


def test_the_shards_of_a_rank_are_known_from_window_to_window() -> None:
    """5e9 positions on 32 ranks: a rank reads a 32nd of them in every window, some blocks each time."""
    shard, block, window = 1 << 20, 1024, 1 << 20
    order = TrainingOrder(num_positions=5 * 10**9, block_size=block, window_blocks=window // block, seed=0)
    seen: set[int] = set()
    for number in range(6):
        shares = order.shares(number, window, rank=5, size=32)
        seen.update(*(np.unique(share.positions_m // shard).tolist() for share in shares))
    assert (
        64 < len(seen) <= 5 * 10**9 // shard // 32 + 3 and 5 * 10**9 // shard < targets_module._INDEXES_KEPT
    )
    samples = tuple(
        StoredSample(key="", first=at * block, count=block, offset=at, compressed_bytes=1, bytes=1, entries=1)
        for at in range(shard // block)
    )
    whole = TargetShard(name="", first=0, count=shard, entries=1024, samples=1024)
    table = SampleTable.of(ShardIndex(samples=samples, end_offset=1024), whole)
    assert sum(array.nbytes for array in vars(table).values()) * targets_module._INDEXES_KEPT < 300e6
    assert list(table.holding(5 * block, 7 * block + 1)) == [
        replace(sample, key=sample_key(sample.first)) for sample in samples[5:8]
    ]


def test_the_bytes_are_repeatable(
    targets_dir: Path, first_shard: str, target_kind: tuple[Encoding, Container], tmp_path: Path
) -> None:
    again = write_targets(tmp_path / "again", *target_kind)
    for name in [first_shard, index_name(first_shard), "manifest.json"]:
        assert (again / name).read_bytes() == (targets_dir / name).read_bytes()


def test_shards_must_cover_the_positions(targets_copy: Path) -> None:
    manifest = read_json(targets_copy / "manifest.json")
    for change, words in (
        ({"num_positions": 118}, "hold 117 of 118"),
        ({"shards": manifest["shards"][1:]}, "leave positions"),
    ):
        publish_json(targets_copy / "manifest.json", {**manifest, **change}, seal=True)
        with pytest.raises(DamagedDataError, match=words):
            open_targets(targets_copy)
    with pytest.raises(UserError, match="does not exist"):
        open_targets(targets_copy / "none")


def test_what_float16_rounds_away_is_dropped_mass() -> None:
    rows = sparse([{3: 1e-9, 5: 0.75}, {}, {2: 1e-9}], np.array([0.25, 0.0, 0.5]))
    block = pack_block(10, rows, dtype=np.dtype("<u2"))
    found = {name: array.tolist() for name, array in block.arrays.items()}
    assert found == {"counts": [1, 0, 0], "ids": [5], "probabilities": [0.75], "dropped": [0.25, 0.0, 0.5]}
    assert block.arrays["ids"].dtype == np.uint16


def test_other_versions_and_keys_are_refused(tmp_path: Path) -> None:
    root = write_targets(tmp_path / "targets")
    manifest = read_json(root / "manifest.json")
    publish_json(root / "manifest.json", {**manifest, "version": 3}, seal=True)
    with pytest.raises(DamagedDataError, match="has version 3, this program reads 1"):
        open_targets(root)
    publish_json(root / "manifest.json", {**manifest, "compression": "zstd"}, seal=True)
    with pytest.raises(DamagedDataError, match="manifest.json: unknown key compression.*version 1"):
        open_targets(root)
    del manifest["encoding"]
    publish_json(root / "manifest.json", manifest, seal=True)
    with pytest.raises(DamagedDataError, match="key encoding is missing"):
        open_targets(root)
