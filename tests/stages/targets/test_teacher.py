"""Keys of exact search are compared with their checksums, each file once, by one of the ranks; the rows of
very many neighbours."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core import files, verified_inputs
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.maths.weighting import Weighting
from mlpmem_ds.stages.retrieval.neighbour_search import open_search
from mlpmem_ds.stages.targets import write_targets
from mlpmem_ds.stages.targets.teacher import Teacher


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


def test_rows_of_almost_all_keys_take_little_memory_and_are_those_of_one_at_a_time(
    make_keys: Callable[..., Path], tmp_path: Path
) -> None:
    """The arrays from distances to rows took four times the memory of the neighbours."""
    codes = np.random.default_rng(0).integers(-6, 7, size=(4000, 6)).astype(np.int8)
    keys = open_keys(make_keys(tmp_path / "keys", codes, np.arange(4000) % 40))
    teacher = Teacher(keys=keys, search=open_search(keys, how="exact"), k=3990)
    teacher.prepare()
    positions, weighting = np.arange(300), Weighting(temperature=40.0)
    neighbours = teacher.find(positions).unpack()
    tracemalloc.start()
    rows = teacher.rows(neighbours, positions, weighting, 0.9)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1.5 * (neighbours.ids_QK.nbytes + neighbours.distances_QK.nbytes)
    single = [
        teacher.rows(neighbours.rows(slice(row, row + 1)), positions[row : row + 1], weighting, 0.9)
        for row in (0, 130, 299)
    ]
    for row, one in zip((0, 130, 299), single, strict=True):
        part = rows.rows(row, row + 1)
        for name in ("ids", "probabilities", "dropped"):
            np.testing.assert_array_equal(getattr(part, name), getattr(one, name))
    assert teacher.rows(neighbours.rows(slice(0, 0)), positions[:0], weighting, 0.9).num_rows == 0
