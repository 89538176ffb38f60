"""Target shards: what is written is read, by us, by zstd and tar, and by stock webdataset; damage is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from mlpmem_ds.core.blocks import split_blocks
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.stage_directory import UnitWriter, open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.targets import (
    FORMAT,
    VERSION,
    index_name,
    open_targets,
    pack_block,
    shard_name,
    write_shard,
)
from mlpmem_ds.maths.targets import SparseRows

NUM_POSITIONS, BLOCK_SIZE, SHARD_POSITIONS, VOCAB_SIZE = 117, 8, 40, 70_000


@dataclass(frozen=True, kw_only=True)
class _Config:
    output: Path


def source() -> tuple[list[dict[int, float]], np.ndarray]:
    """Rows of (id → probability), some empty, and their dropped mass."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(NUM_POSITIONS):
        ids = np.sort(generator.choice(VOCAB_SIZE, generator.integers(0, 9), replace=False))
        weights = generator.random(len(ids))
        rows.append(dict(zip(ids.tolist(), (weights / max(weights.sum(), 1e-9) * 0.9).tolist(), strict=True)))
    return rows, np.array([0.1 if row else 0.0 for row in rows])


def sparse(rows: list[dict[int, float]]) -> SparseRows:
    return SparseRows(
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
        ids=np.array([token for row in rows for token in row], np.int64),
        probabilities=np.array([probability for row in rows for probability in row.values()]),
    )


def write_targets(root: Path) -> Path:
    rows, dropped = source()
    shards = {f"knn-{block.start}": block for block in split_blocks(NUM_POSITIONS, SHARD_POSITIONS)}
    stage = open_stage(
        root, stage=FORMAT, version=VERSION, config=_Config(output=root), inputs={"keys": "0" * 64}, world=World()
    )

    def write(unit: str, writer: UnitWriter) -> dict[str, int]:
        start, stop = shards[unit]
        blocks = [
            pack_block(
                start + part.start,
                sparse(rows[start + part.start : start + part.stop]),
                dropped[start + part.start : start + part.stop],
                dtype=np.dtype("<u4"),
            )
            for part in split_blocks(stop - start, BLOCK_SIZE)
        ]
        name = shard_name(start, stop - start)
        with writer.file(name) as shard_path, writer.file(index_name(name)) as index_path:
            return write_shard(shard_path, index_path, blocks)

    def describe() -> dict[str, Any]:
        return {
            "num_positions": NUM_POSITIONS,
            "vocab_size": VOCAB_SIZE,
            "block_size": BLOCK_SIZE,
            "shards": [
                {"name": shard_name(block.start, block.size), "first": block.start, "count": block.size, **summary}
                for block, summary in zip(shards.values(), stage.summaries(list(shards)), strict=True)
            ],
        }

    stage.run_units(list(shards), write)
    stage.finish(list(shards), describe)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_targets(tmp_path_factory.mktemp("targets") / "targets")


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "copy"))


FIRST = shard_name(0, SHARD_POSITIONS)


def expect_rows(found: Any, start: int, stop: int) -> None:
    rows, dropped = source()
    expected = sparse(rows[start:stop])
    assert np.array_equal(found.offsets, expected.offsets) and np.array_equal(found.ids, expected.ids)
    assert np.array_equal(found.probabilities, expected.probabilities.astype(np.float16).astype(np.float32))
    assert np.array_equal(found.dropped, dropped[start:stop].astype(np.float16).astype(np.float32))


def test_any_range_is_read(root: Path) -> None:
    targets = open_targets(root)
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
        expect_rows(targets.read(start, stop), start, stop)
    expect_rows(targets.read_all(), 0, NUM_POSITIONS)
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


def test_the_bytes_are_repeatable(root: Path, tmp_path: Path) -> None:
    again = write_targets(tmp_path / "again")
    for name in [FIRST, index_name(FIRST), "manifest.json"]:
        assert (again / name).read_bytes() == (root / name).read_bytes()


def test_only_the_frames_that_are_needed_are_touched(copy: Path) -> None:
    targets = open_targets(copy)
    samples = json.loads((copy / index_name(FIRST)).read_text())["samples"]
    path = copy / FIRST
    content = bytearray(path.read_bytes())
    content[samples[2]["offset"] + 20] ^= 255
    path.write_bytes(content)
    expect_rows(targets.read(0, 16), 0, 16)
    expect_rows(targets.read(24, 60), 24, 60)
    with pytest.raises(DamagedDataError, match=f"{FIRST}.*sample 000000000016"):
        targets.read(0, 17)
    with pytest.raises(DamagedDataError, match=f"{FIRST}.*checksum.*run the stage"):
        targets.read_all()


def test_no_flipped_bit_gives_other_rows(copy: Path) -> None:
    generator = np.random.default_rng(3)
    for name in (FIRST, index_name(FIRST)):
        whole = (copy / name).read_bytes()
        for place in generator.choice(len(whole), 300, replace=False):
            content = bytearray(whole)
            content[place] ^= 1 << int(generator.integers(8))
            (copy / name).write_bytes(content)
            with pytest.raises(DamagedDataError):
                open_targets(copy).read_all()
            try:
                found = open_targets(copy).read(0, SHARD_POSITIONS)
            except DamagedDataError:
                continue
            expect_rows(found, 0, SHARD_POSITIONS)
        (copy / name).write_bytes(whole)


def test_a_shard_cut_short_is_refused(copy: Path) -> None:
    whole = (copy / FIRST).read_bytes()
    before = open_targets(copy)
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        (copy / FIRST).write_bytes(whole[:length])
        with pytest.raises(DamagedDataError, match=f"{FIRST} has {length} bytes"):
            open_targets(copy)
    (copy / FIRST).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedDataError, match="too early; run the stage"):
        before.read(0, SHARD_POSITIONS)
    (copy / FIRST).unlink()
    with pytest.raises(DamagedDataError, match="missing"):
        open_targets(copy)


def rerecord(root: Path, name: str) -> None:
    """Make the manifest agree with an altered file, so that only the reader's own comparison is left."""
    manifest = json.loads((root / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["name"] == name:
            content = (root / name).read_bytes()
            entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (root / "manifest.json").write_text(json.dumps(manifest))


def exchange_samples(index: dict[str, Any]) -> None:
    index["samples"][0], index["samples"][1] = index["samples"][1], index["samples"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (exchange_samples, "does not follow"),
        (lambda index: index["samples"].pop(), "manifest says otherwise"),
        (
            lambda index: index["samples"][2].update(entries=index["samples"][2]["entries"] + 1),
            "manifest says otherwise",
        ),
        (lambda index: index["samples"][1].update(offset=3), "does not follow"),
        (lambda index: index.update(end_offset=3), "end at byte"),
        (lambda index: index["samples"][0].update(bytes=5), "header does not match"),
        (
            lambda index: [
                index["samples"][n].update(entries=index["samples"][n]["entries"] + d) for n, d in ((0, 1), (1, -1))
            ],
            "index says",
        ),
    ],
)
def test_an_index_that_disagrees_is_refused(copy: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    path = copy / index_name(FIRST)
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    rerecord(copy, path.name)
    with pytest.raises(DamagedDataError, match=words):
        open_targets(copy).read(0, SHARD_POSITIONS)


def test_shards_must_cover_the_positions(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    for change, words in (
        ({"num_positions": 118}, "hold 117 of 118"),
        ({"shards": manifest["shards"][1:]}, "leave positions"),
    ):
        (copy / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(DamagedDataError, match=words):
            open_targets(copy)
    with pytest.raises(UserError, match="does not exist"):
        open_targets(copy / "none")


def test_what_float16_rounds_away_is_dropped_mass() -> None:
    rows = sparse([{3: 1e-9, 5: 0.75}, {}, {2: 1e-9}])
    block = pack_block(10, rows, np.array([0.25, 0.0, 0.5]), dtype=np.dtype("<u2"))
    assert block.counts.tolist() == [1, 0, 0] and block.ids.tolist() == [5] and block.ids.dtype == np.uint16
    assert block.dropped.tolist() == [0.25, 0.0, 0.5] and block.probabilities.tolist() == [0.75]


def check_members(root: Path, name: str, members: dict[str, bytes], tmp_path: Path) -> None:
    """Decode a shard's members from the specification alone and compare."""
    rows, dropped = source()
    shard = next(shard for shard in json.loads((root / "manifest.json").read_text())["shards"] if shard["name"] == name)
    assert len(members) == 5 * shard["samples"]

    def array(name: str) -> np.ndarray:
        (tmp_path / "member").write_bytes(members[name])
        return np.load(tmp_path / "member", allow_pickle=False)

    for first in range(shard["first"], shard["first"] + shard["count"], BLOCK_SIZE):
        stop = min(first + BLOCK_SIZE, shard["first"] + shard["count"])
        key, expected = f"{first:012d}", sparse(rows[first:stop])
        assert array(f"{key}.counts.npy").tolist() == np.diff(expected.offsets).tolist()
        assert array(f"{key}.ids.npy").dtype == np.uint32 and array(f"{key}.ids.npy").tolist() == expected.ids.tolist()
        assert np.array_equal(array(f"{key}.probabilities.npy"), expected.probabilities.astype(np.float16))
        assert np.array_equal(array(f"{key}.dropped.npy"), dropped[first:stop].astype(np.float16))
        assert json.loads(members[f"{key}.meta.json"]) == {
            "first": first,
            "count": stop - first,
            "entries": len(expected.ids),
            "format": "mlpmem-targets",
            "version": 1,
        }


@pytest.mark.skipif(not shutil.which("zstd"), reason="the zstd command is not on this machine")
def test_zstd_and_tar_read_a_shard(root: Path, tmp_path: Path) -> None:
    tar = subprocess.run(["zstd", "-dc", str(root / FIRST)], check=True, capture_output=True).stdout
    listing = subprocess.run(["tar", "-tv"], input=tar, check=True, capture_output=True, text=False).stdout.decode()
    assert listing.splitlines()[0].startswith("-rw-r--r-- 0/0") and "1970-01-01" in listing
    (tmp_path / "shard.tar").write_bytes(tar)
    with tarfile.open(tmp_path / "shard.tar") as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert [line.split()[-1] for line in listing.splitlines()] == list(members)
    check_members(root, FIRST, members, tmp_path)


@pytest.mark.skipif(not shutil.which("zstd"), reason="the zstd command is not on this machine")
def test_stock_webdataset_reads_the_shards(root: Path, tmp_path: Path) -> None:
    shards = json.loads((root / "manifest.json").read_text())["shards"]
    for shard in shards:
        samples = list(webdataset.WebDataset(f"pipe:zstd -dc {root / shard['name']}", shardshuffle=False))
        members = {
            f"{sample['__key__']}.{name}": content
            for sample in samples
            for name, content in sample.items()
            if not name.startswith("__")
        }
        check_members(root, shard["name"], members, tmp_path)
    urls = [f"pipe:zstd -dc {root / shard['name']}" for shard in shards]
    decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert sum(len(sample["counts.npy"]) for sample in decoded) == NUM_POSITIONS
    assert sum(sample["meta.json"]["entries"] for sample in decoded) == sum(shard["entries"] for shard in shards)
