"""What a search reads is compared with its checksums by units of the stage, keys, values and shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core.config import Flags
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.index_directory import open_index
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.retrieval.verification import verify_index, verify_keys


@pytest.fixture
def keys(make_keys: Callable[..., Path], tmp_path: Path) -> Path:
    codes = np.random.default_rng(0).integers(-6, 7, size=(403, 6)).astype(np.int8)
    return make_keys(tmp_path / "keys", codes, np.arange(403) % 40, unit_positions=96)


def stage_of(root: Path) -> StageDirectory:
    return open_stage(root, stage="reader", version=1, config=Flags(), inputs={}, world=World())


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("array", ["keys", "values"])
def test_a_flipped_byte_of_a_key_or_value_is_found(keys: Path, tmp_path: Path, array: str) -> None:
    verify_keys(stage_of(tmp_path / "whole"), open_keys(keys))
    victim = sorted(keys.glob(f"{array}-*.npy"))[3]
    flip_last_byte(victim)
    with pytest.raises(DamagedDataError, match=f"{victim.name} does not have the checksum"):
        verify_keys(stage_of(tmp_path / "reader"), open_keys(keys))


def test_a_flipped_byte_of_a_shard_is_found(keys: Path, tmp_path: Path) -> None:
    config = build_index.Config(keys=keys, output=tmp_path / "index", factory="IVF4,PQ3x4", num_shards=2)
    build_index.run(config, World())
    index = open_index(config.output)
    verify_index(stage_of(tmp_path / "whole"), index)
    flip_last_byte(index.shard_paths[1])
    with pytest.raises(DamagedDataError, match="shard-1.faissindex does not have the checksum"):
        verify_index(stage_of(tmp_path / "reader"), index)
