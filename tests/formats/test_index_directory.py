"""An index directory is opened whole or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlpmem_ds.core.blocks import split_blocks
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import publish_json, read_json
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.index_directory import blocks_of_shard, open_index
from mlpmem_ds.stages.index import build_index


@pytest.fixture
def index_dir(keys_dir: Path, tmp_path: Path) -> Path:
    build_index.run(
        build_index.Config(keys=keys_dir, output=tmp_path / "index", factory="IVF4,Flat", num_shards=2),
        World(),
    )
    return tmp_path / "index"


def test_blocks_are_dealt_to_the_shards() -> None:
    blocks = split_blocks(50, 8)
    dealt = [blocks_of_shard(blocks, shard, 3) for shard in range(3)]
    assert dealt[1] == [blocks[1], blocks[4]] and sorted(sum(dealt, [])) == blocks


def test_an_index_says_what_it_is(index_dir: Path, keys_dir: Path) -> None:
    index = open_index(index_dir)
    assert (index.factory, index.num_lists) == ("IVF4,Flat", 4)
    assert [path.name for path in index.shard_paths] == ["shard-0.faissindex", "shard-1.faissindex"]
    assert index.num_bytes == sum(path.stat().st_size for path in [index.trained_path, *index.shard_paths])
    assert index.num_vectors == json.loads((keys_dir / "manifest.json").read_text())["num_positions"]


def test_a_missing_or_other_directory_is_refused(keys_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_index(tmp_path / "none")
    with pytest.raises(UserError, match="not mlpmem-index"):
        open_index(keys_dir)


def test_damage_is_refused(index_dir: Path) -> None:
    shard = index_dir / "shard-1.faissindex"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(DamagedDataError, match="shard-1.faissindex has"):
        open_index(index_dir)
    shard.write_bytes(whole)
    manifest = read_json(index_dir / "manifest.json")
    manifest["shards"][0]["num_vectors"] += 1
    publish_json(index_dir / "manifest.json", manifest, seal=True)
    with pytest.raises(DamagedDataError, match="contradicts itself"):
        open_index(index_dir)
