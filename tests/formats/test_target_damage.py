"""Altered and shortened targets are refused, and only by readers of what was altered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import publish_json, read_json
from mlpmem_ds.formats.target_encoding import Encoding
from mlpmem_ds.formats.target_shards import Container, index_name
from mlpmem_ds.formats.targets import ORDER_NAME, open_targets
from mlpmem_ds.maths.sparse_rows import SparseRows

from .toy_targets import SHARD_POSITIONS, VOCAB_SIZE, expect_rows


def test_only_the_samples_that_are_needed_are_touched(
    targets_copy: Path, first_shard: str, target_kind: tuple[Encoding, Container]
) -> None:
    targets = open_targets(targets_copy)
    samples = json.loads((targets_copy / index_name(first_shard)).read_text())["samples"]
    path = targets_copy / first_shard
    content = bytearray(path.read_bytes())
    content[samples[2]["offset"] + 20] ^= 255
    path.write_bytes(content)
    expect_rows(targets.read(0, 16), 0, 16, target_kind)
    expect_rows(targets.read(24, 60), 24, 60, target_kind)
    with pytest.raises(DamagedDataError, match=f"{first_shard}.*sample 000000000016"):
        targets.read(0, 17)
    with pytest.raises(DamagedDataError, match=f"{first_shard}.*checksum.*run the stage"):
        targets.read_all()


def same_rows(found: SparseRows, expected: SparseRows) -> bool:
    names = ("offsets", "ids", "probabilities", "dropped")
    return all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in names)


def test_no_altered_byte_gives_other_rows(targets_copy: Path, first_shard: str) -> None:
    """600 places of the shard and its index; what only pads a tar may change, and the whole file's checksum
    sees that too."""
    generator = np.random.default_rng(3)
    expected = open_targets(targets_copy).read(0, SHARD_POSITIONS)
    refused = 0
    for name in (first_shard, index_name(first_shard)):
        whole = (targets_copy / name).read_bytes()
        for place in generator.choice(len(whole), 300, replace=False):
            content = bytearray(whole)
            content[place] ^= int(generator.integers(1, 256))
            (targets_copy / name).write_bytes(content)
            with pytest.raises(DamagedDataError):
                open_targets(targets_copy).read_all()
            try:
                assert same_rows(open_targets(targets_copy).read(0, SHARD_POSITIONS), expected)
            except DamagedDataError:
                refused += 1
        (targets_copy / name).write_bytes(whole)
    assert refused > 400


def test_an_altered_order_of_the_vocabulary_is_refused(
    targets_copy: Path, target_kind: tuple[Encoding, Container]
) -> None:
    path = targets_copy / ORDER_NAME
    if target_kind[0] == "exact":
        assert not path.exists()
        return
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedDataError, match="frequency_order.npy does not have the checksum"):
        open_targets(targets_copy).read(0, 1)
    np.save(path, np.zeros(VOCAB_SIZE, "<u4"))
    rerecord(targets_copy, ORDER_NAME)
    with pytest.raises(DamagedDataError, match="name each token once"):
        open_targets(targets_copy).read(0, 1)


def test_a_shard_cut_short_is_refused(targets_copy: Path, first_shard: str) -> None:
    whole = (targets_copy / first_shard).read_bytes()
    before = open_targets(targets_copy)
    for length in range(0, len(whole), max(1, len(whole) // 150)):
        (targets_copy / first_shard).write_bytes(whole[:length])
        with pytest.raises(DamagedDataError, match=f"{first_shard} has {length} bytes"):
            open_targets(targets_copy)
        samples = json.loads((targets_copy / index_name(first_shard)).read_text())["samples"]
        if length < samples[-1]["offset"] + samples[-1]["compressed_bytes"]:
            with pytest.raises(DamagedDataError, match=f"too early; run the stage|has {length} bytes"):
                before.read(0, SHARD_POSITIONS)
    (targets_copy / first_shard).unlink()
    with pytest.raises(DamagedDataError, match="missing"):
        open_targets(targets_copy)


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
    targets_copy: Path, first_shard: str, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    path = targets_copy / index_name(first_shard)
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    rerecord(targets_copy, path.name)
    with pytest.raises(DamagedDataError, match=words):
        open_targets(targets_copy).read(0, SHARD_POSITIONS)
