"""Target shards are read by zstd and tar, by stock webdataset, and by the words of the specification."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import zstandard

from mlpmem_ds.core.files import read_json
from mlpmem_ds.formats.target_encoding import Encoding, pack_block
from mlpmem_ds.formats.target_shards import Container, _members, _tar_of, index_name, sample_key
from mlpmem_ds.formats.targets import ORDER_NAME, open_targets

from .toy_targets import BLOCK_SIZE, NUM_POSITIONS, source, sparse


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
def test_zstd_and_tar_read_a_shard(targets_dir: Path, first_shard: str, tmp_path: Path) -> None:
    if first_shard.endswith(".zst"):
        tar = subprocess.run(
            ["zstd", "-dc", str(targets_dir / first_shard)], check=True, capture_output=True
        ).stdout
    else:
        tar = (targets_dir / first_shard).read_bytes()
    environment = {**os.environ, "TZ": "UTC", "LC_ALL": "C"}  # tar shows times of this place
    listing = subprocess.run(
        ["tar", "-tv"], input=tar, check=True, capture_output=True, env=environment
    ).stdout.decode()
    assert listing.splitlines()[0].startswith("-rw-r--r-- 0/0") and "1970-01-01" in listing
    (tmp_path / "shard.tar").write_bytes(tar)
    with tarfile.open(tmp_path / "shard.tar") as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        offsets = {member.name: member.offset for member in archive.getmembers()}
    assert [line.split()[-1] for line in listing.splitlines()] == list(members)
    if not first_shard.endswith(".zst"):
        for sample in json.loads((targets_dir / index_name(first_shard)).read_text())["samples"]:
            assert (
                offsets[f"{sample['key']}.counts.npy.zst"] == sample["offset"]
            )  # random access by the tar's offsets
        subprocess.run(["tar", "-xf", str(targets_dir / first_shard), "-C", str(tmp_path)], check=True)
        name = f"{0:012d}.counts.npy.zst"
        plain = subprocess.run(["zstd", "-dc", str(tmp_path / name)], check=True, capture_output=True).stdout
        assert plain == zstandard.decompress(members[name])
    check_members(targets_dir, first_shard, plain_members(members))


@pytest.mark.skipif(not shutil.which("zstd"), reason="the zstd command is not on this machine")
def test_stock_webdataset_reads_the_shards(
    targets_dir: Path, target_kind: tuple[Encoding, Container]
) -> None:
    shards = json.loads((targets_dir / "manifest.json").read_text())["shards"]
    urls = [
        f"pipe:zstd -dc {targets_dir / shard['name']}"
        if target_kind[1] == "tar.zst"
        else str(targets_dir / shard["name"])
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
        check_members(targets_dir, shard["name"], plain_members(members))
    if target_kind[1] == "tar":
        return  # webdataset has no decoder of its own for .zst
    decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert sum(len(sample["counts.npy"]) for sample in decoded) == NUM_POSITIONS
    assert sum(sample["meta.json"]["entries"] for sample in decoded) == sum(
        shard["entries"] for shard in shards
    )


def test_webdatasets_writer_gives_the_same_members_in_another_order() -> None:
    """Why shards are not written by it: it puts the members in alphabetical order, where the format has its
    own, it fills every tar up to 10,240 bytes, and it does not say where a sample begins, which the index
    needs. A sample takes it 1.4 ms, and 1.0 ms here. Header and content of each member are the same bytes."""
    block = pack_block(0, sparse([{3: 0.5, 7: 0.5}, {1: 1.0}]), dtype=np.dtype("<u2"))
    ours = _tar_of(block, None)
    members = _members(ours)
    stream = io.BytesIO()
    options: dict[str, Any] = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False}
    with webdataset.TarWriter(stream, **options) as writer:
        key = sample_key(0)
        writer.write({"__key__": key, **{name.removeprefix(f"{key}."): members[name] for name in members}})
    theirs = stream.getvalue()
    assert len(theirs) % 10_240 == 0 and theirs[: len(ours)] != ours
    found = _members(theirs[: len(ours)])
    assert list(found) == sorted(members) and found == members
    pieces = [theirs[place : place + 512] for place in range(0, len(ours), 512)]
    assert sorted(pieces) == sorted(ours[place : place + 512] for place in range(0, len(ours), 512))
