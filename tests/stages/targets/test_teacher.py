"""Keys of exact search are compared with their checksums: each file once, by one of the ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core import files, verified_inputs
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.targets import write_targets


def test_exact_search_compares_each_key_file_once_over_all_ranks_and_starts(
    make_keys: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = np.random.default_rng(0).integers(-6, 7, size=(403, 6)).astype(np.int8)
    keys = make_keys(tmp_path / "keys", codes, np.arange(403) % 40, unit_positions=96)
    monkeypatch.setattr(verified_inputs, "_MIN_FILES", 3)
    hashed: list[str] = []
    original = files.sha256_of_file

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return original(path)

    monkeypatch.setattr(files, "sha256_of_file", counted)
    config = write_targets.Config(
        keys=keys, output=tmp_path / "targets", k=20, temperature="6", shard_positions=104
    )
    for rank in (1, 0, 1):
        write_targets.run(config, World(rank=rank, size=2))
    names = sorted(name for name in hashed if name.startswith(("keys-", "values-")))
    assert names == sorted(path.name for path in keys.glob("*-*.npy")) and len(names) == 10


def test_a_flipped_byte_is_refused_before_a_row_is_written(
    make_keys: Callable[..., Path], tmp_path: Path
) -> None:
    codes = np.random.default_rng(0).integers(-6, 7, size=(403, 6)).astype(np.int8)
    keys = make_keys(tmp_path / "keys", codes, np.arange(403) % 40, unit_positions=96)
    path = keys / "values-000000000192.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    config = write_targets.Config(keys=keys, output=tmp_path / "targets", k=20, temperature="6")
    with pytest.raises(DamagedDataError, match="values-000000000192.npy does not have the checksum"):
        write_targets.run(config, World())
    assert not list(config.output.glob("knn-*"))
