"""Target shards in both encodings and containers: what is written is read, by us, by zstd and tar, and by
stock webdataset; damage is refused."""

from __future__ import annotations

import hashlib
import io
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
import zstandard

from mlpmem_ds.core.blocks import split_blocks
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import publish_json, read_json
from mlpmem_ds.core.stage_directory import UnitWriter, open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.target_encoding import Encoding, pack_block
from mlpmem_ds.formats.target_shards import Container, TargetShard, index_name, shard_name, write_shard
from mlpmem_ds.formats.targets import ORDER_NAME, TargetsManifest, open_targets
from mlpmem_ds.maths.sparse_rows import SparseRows

from ..manifests import targets_manifest

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


def sparse(rows: list[dict[int, float]], dropped: np.ndarray | None = None) -> SparseRows:
    return SparseRows.of_counts(
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
        config=_Config(output=root),
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
    stage.finish(units, describe)
    return root


@pytest.fixture(
    scope="module", params=[(e, c) for e in ("exact", "compact") for c in ("tar.zst", "tar")], ids="-".join
)
def kind(request: pytest.FixtureRequest) -> tuple[Encoding, Container]:
    return request.param


@pytest.fixture(scope="module")
def root(kind: tuple[Encoding, Container], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_targets(tmp_path_factory.mktemp("targets") / "targets", *kind)


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "copy"))


@pytest.fixture(scope="module")
def first(kind: tuple[Encoding, Container]) -> str:
    return shard_name(0, SHARD_POSITIONS, kind[1])


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


def test_any_range_is_read(root: Path, kind: tuple[Encoding, Container]) -> None:
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
        expect_rows(targets.read(start, stop), start, stop, kind)
    expect_rows(targets.read_all(), 0, NUM_POSITIONS, kind)
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


def test_any_order_of_positions_is_read(root: Path) -> None:
    targets = open_targets(root)
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


def test_the_bytes_are_repeatable(
    root: Path, first: str, kind: tuple[Encoding, Container], tmp_path: Path
) -> None:
    again = write_targets(tmp_path / "again", *kind)
    for name in [first, index_name(first), "manifest.json"]:
        assert (again / name).read_bytes() == (root / name).read_bytes()


def test_only_the_samples_that_are_needed_are_touched(
    copy: Path, first: str, kind: tuple[Encoding, Container]
) -> None:
    targets = open_targets(copy)
    samples = json.loads((copy / index_name(first)).read_text())["samples"]
    path = copy / first
    content = bytearray(path.read_bytes())
    content[samples[2]["offset"] + 20] ^= 255
    path.write_bytes(content)
    expect_rows(targets.read(0, 16), 0, 16, kind)
    expect_rows(targets.read(24, 60), 24, 60, kind)
    with pytest.raises(DamagedDataError, match=f"{first}.*sample 000000000016"):
        targets.read(0, 17)
    with pytest.raises(DamagedDataError, match=f"{first}.*checksum.*run the stage"):
        targets.read_all()


def same_rows(found: SparseRows, expected: SparseRows) -> bool:
    names = ("offsets", "ids", "probabilities", "dropped")
    return all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in names)


def test_no_altered_byte_gives_other_rows(copy: Path, first: str) -> None:
    """600 places of the shard and its index; what only pads a tar may change, and the whole file's checksum
    sees that too."""
    generator = np.random.default_rng(3)
    expected = open_targets(copy).read(0, SHARD_POSITIONS)
    refused = 0
    for name in (first, index_name(first)):
        whole = (copy / name).read_bytes()
        for place in generator.choice(len(whole), 300, replace=False):
            content = bytearray(whole)
            content[place] ^= int(generator.integers(1, 256))
            (copy / name).write_bytes(content)
            with pytest.raises(DamagedDataError):
                open_targets(copy).read_all()
            try:
                assert same_rows(open_targets(copy).read(0, SHARD_POSITIONS), expected)
            except DamagedDataError:
                refused += 1
        (copy / name).write_bytes(whole)
    assert refused > 400


def test_an_altered_order_of_the_vocabulary_is_refused(copy: Path, kind: tuple[Encoding, Container]) -> None:
    path = copy / ORDER_NAME
    if kind[0] == "exact":
        assert not path.exists()
        return
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedDataError, match="frequency_order.npy does not have the checksum"):
        open_targets(copy).read(0, 1)
    np.save(path, np.zeros(VOCAB_SIZE, "<u4"))
    rerecord(copy, ORDER_NAME)
    with pytest.raises(DamagedDataError, match="name each token once"):
        open_targets(copy).read(0, 1)


def test_a_shard_cut_short_is_refused(copy: Path, first: str) -> None:
    whole = (copy / first).read_bytes()
    before = open_targets(copy)
    for length in range(0, len(whole), max(1, len(whole) // 150)):
        (copy / first).write_bytes(whole[:length])
        with pytest.raises(DamagedDataError, match=f"{first} has {length} bytes"):
            open_targets(copy)
        samples = json.loads((copy / index_name(first)).read_text())["samples"]
        if length < samples[-1]["offset"] + samples[-1]["compressed_bytes"]:
            with pytest.raises(DamagedDataError, match="too early; run the stage"):
                before.read(0, SHARD_POSITIONS)
    (copy / first).unlink()
    with pytest.raises(DamagedDataError, match="missing"):
        open_targets(copy)


def rerecord(root: Path, name: str) -> None:
    """Make the manifest agree with an altered file, so that only the reader's own comparison is left."""
    manifest = read_json(root / "manifest.json")
    for entry in manifest["files"]:
        if entry["name"] == name:
            content = (root / name).read_bytes()
            entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    publish_json(root / "manifest.json", manifest, seal=True)


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
        (lambda index: index["samples"][0].update(bytes=5), "does not match the index"),
        (
            lambda index: [
                index["samples"][n].update(entries=index["samples"][n]["entries"] + d)
                for n, d in ((0, 1), (1, -1))
            ],
            "index says",
        ),
    ],
)
def test_an_index_that_disagrees_is_refused(
    copy: Path, first: str, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    path = copy / index_name(first)
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    rerecord(copy, path.name)
    with pytest.raises(DamagedDataError, match=words):
        open_targets(copy).read(0, SHARD_POSITIONS)


def test_shards_must_cover_the_positions(copy: Path) -> None:
    manifest = read_json(copy / "manifest.json")
    for change, words in (
        ({"num_positions": 118}, "hold 117 of 118"),
        ({"shards": manifest["shards"][1:]}, "leave positions"),
    ):
        publish_json(copy / "manifest.json", {**manifest, **change}, seal=True)
        with pytest.raises(DamagedDataError, match=words):
            open_targets(copy)
    with pytest.raises(UserError, match="does not exist"):
        open_targets(copy / "none")


def test_what_float16_rounds_away_is_dropped_mass() -> None:
    rows = sparse([{3: 1e-9, 5: 0.75}, {}, {2: 1e-9}], np.array([0.25, 0.0, 0.5]))
    block = pack_block(10, rows, dtype=np.dtype("<u2"))
    found = {name: array.tolist() for name, array in block.arrays.items()}
    assert found == {"counts": [1, 0, 0], "ids": [5], "probabilities": [0.75], "dropped": [0.25, 0.0, 0.5]}
    assert block.arrays["ids"].dtype == np.uint16


def decode(
    arrays: dict[str, np.ndarray], meta: dict[str, Any], order_V: np.ndarray
) -> list[dict[int, float]]:
    """The compact encoding by the words of the specification, entry by entry."""
    gaps, wide_gaps = arrays["gaps"].tolist(), arrays["wide_gaps"].tolist()
    levels, wide_levels = arrays["levels"].tolist(), arrays["wide_levels"].tolist()
    rows = []
    for count, dropped in zip(arrays["counts"].tolist(), arrays["dropped"].tolist(), strict=True):
        row, rank = {}, -1
        for _ in range(count):
            gap, level = gaps.pop(0), levels.pop(0)
            rank += 1 + (wide_gaps.pop(0) if gap == 255 else gap)
            level = wide_levels.pop(0) if level == 0 else level
            row[int(order_V[rank])] = (level / meta["steps"]) ** 1.5
        total, kept = sum(row.values()), 1 - dropped * meta["dropped_step"]
        rows.append({token: row[token] * kept / total for token in sorted(row)})
    assert not (gaps or wide_gaps or levels or wide_levels)
    return rows


def check_members(root: Path, name: str, members: dict[str, bytes]) -> None:
    """Decode a shard's members from the specification alone and compare with the source and with our
    reader."""
    rows, dropped = source()
    manifest = read_json(root / "manifest.json")
    shard = next(shard for shard in manifest["shards"] if shard["name"] == name)
    is_exact = manifest["encoding"] == "exact"
    assert len(members) == (5 if is_exact else 7) * shard["samples"]
    for begin in range(shard["first"], shard["first"] + shard["count"], BLOCK_SIZE):
        stop = min(begin + BLOCK_SIZE, shard["first"] + shard["count"])
        key, expected = f"{begin:012d}", sparse(rows[begin:stop])
        meta = json.loads(members.pop(f"{key}.meta.json"))
        arrays = {
            member.split(".")[1]: np.load(io.BytesIO(content), allow_pickle=False)
            for member, content in members.items()
            if member.startswith(key)
        }
        assert arrays["counts"].tolist() == np.diff(expected.offsets).tolist()
        common = {
            "first": begin,
            "count": stop - begin,
            "entries": len(expected.ids),
            "format": "mlpmem-targets",
        }
        if is_exact:
            assert meta == {**common, "version": 1}
            assert arrays["ids"].dtype == np.uint32 and arrays["ids"].tolist() == expected.ids.tolist()
            assert np.array_equal(arrays["probabilities"], expected.probabilities.astype(np.float16))
            assert np.array_equal(arrays["dropped"], dropped[begin:stop].astype(np.float16))
            continue
        assert meta | common == meta and meta["version"] == 2
        decoded = decode(arrays, meta, np.load(root / ORDER_NAME))
        found = open_targets(root).read(begin, stop)
        assert [token for row in decoded for token in row] == expected.ids.tolist() == found.ids.tolist()
        assert np.allclose([p for row in decoded for p in row.values()], found.probabilities, rtol=1e-6)


def plain_members(members: dict[str, bytes]) -> dict[str, bytes]:
    """What stands in a tar of zstd members."""
    return {
        name.removesuffix(".zst"): zstandard.decompress(content) if name.endswith(".zst") else content
        for name, content in members.items()
    }


@pytest.mark.skipif(not shutil.which("zstd"), reason="the zstd command is not on this machine")
def test_zstd_and_tar_read_a_shard(root: Path, first: str, tmp_path: Path) -> None:
    if first.endswith(".zst"):
        tar = subprocess.run(["zstd", "-dc", str(root / first)], check=True, capture_output=True).stdout
    else:
        tar = (root / first).read_bytes()
    listing = subprocess.run(
        ["tar", "-tv"], input=tar, check=True, capture_output=True, text=False
    ).stdout.decode()
    assert listing.splitlines()[0].startswith("-rw-r--r-- 0/0") and "1970-01-01" in listing
    (tmp_path / "shard.tar").write_bytes(tar)
    with tarfile.open(tmp_path / "shard.tar") as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        offsets = {member.name: member.offset for member in archive.getmembers()}
    assert [line.split()[-1] for line in listing.splitlines()] == list(members)
    if not first.endswith(".zst"):
        for sample in json.loads((root / index_name(first)).read_text())["samples"]:
            assert (
                offsets[f"{sample['key']}.counts.npy.zst"] == sample["offset"]
            )  # random access by the tar's offsets
        subprocess.run(["tar", "-xf", str(root / first), "-C", str(tmp_path)], check=True)
        name = f"{0:012d}.counts.npy.zst"
        plain = subprocess.run(["zstd", "-dc", str(tmp_path / name)], check=True, capture_output=True).stdout
        assert plain == zstandard.decompress(members[name])
    check_members(root, first, plain_members(members))


@pytest.mark.skipif(not shutil.which("zstd"), reason="the zstd command is not on this machine")
def test_stock_webdataset_reads_the_shards(root: Path, kind: tuple[Encoding, Container]) -> None:
    shards = json.loads((root / "manifest.json").read_text())["shards"]
    urls = [
        f"pipe:zstd -dc {root / shard['name']}" if kind[1] == "tar.zst" else str(root / shard["name"])
        for shard in shards
    ]
    for shard, url in zip(shards, urls, strict=True):
        samples = list(webdataset.WebDataset(url, shardshuffle=False))
        members = {
            f"{sample['__key__']}.{name}": content
            for sample in samples
            for name, content in sample.items()
            if not name.startswith("__")
        }
        check_members(root, shard["name"], plain_members(members))
    if kind[1] == "tar":
        return  # webdataset has no decoder of its own for .zst
    decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert sum(len(sample["counts.npy"]) for sample in decoded) == NUM_POSITIONS
    assert sum(sample["meta.json"]["entries"] for sample in decoded) == sum(
        shard["entries"] for shard in shards
    )


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
