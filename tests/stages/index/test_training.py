"""The sample of the keys, read by one rank or by several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.engines.collectives.alone import Alone
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.stages.index.training import sample_of_keys

NUM_KEYS = 1003


@pytest.fixture
def keys(make_keys: Any, tmp_path: Path) -> Path:
    vectors = np.random.default_rng(0).integers(-80, 80, (NUM_KEYS, 16)).astype(np.int8)
    return make_keys(tmp_path / "keys", vectors, np.zeros(NUM_KEYS, np.int64))


class Part(Alone):
    """A rank of three that is told the others' counts."""

    def __init__(self, rank: int, counts: np.ndarray) -> None:
        super().__init__()
        self.rank, self.size, self._counts = rank, 3, counts

    def sum(self, array: np.ndarray) -> np.ndarray:
        return self._counts


@pytest.mark.parametrize("count", [300, NUM_KEYS])
def test_ranks_read_their_units_of_one_sample(
    keys: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    opened, read = open_keys(keys), list[int]()
    whole = sample_of_keys(opened, count, Alone())
    assert abs(whole.total - count) < 100 and (whole.numbers_n == np.arange(whole.total)).all()
    positions = [(opened.read("keys") == vector).all(axis=1).argmax() for vector in whole.vectors_nD]
    counts = np.bincount(np.array(positions) // 96, minlength=11)
    stored = Keys._stored
    monkeypatch.setattr(Keys, "_stored", lambda self, *args: read.append(args[1]) or stored(self, *args))
    parts = [sample_of_keys(opened, count, Part(rank, counts)) for rank in range(3)]
    own = [first for first in read if first]  # the first one is also asked for the shape of its rows
    assert len(own) == len(set(own)) == 10, "each unit by one rank"
    numbers = np.concatenate([part.numbers_n for part in parts])
    vectors = np.concatenate([part.vectors_nD for part in parts])
    assert (vectors[np.argsort(numbers)] == whole.vectors_nD).all()
    assert all(part.total == whole.total and (np.diff(part.numbers_n) > 0).all() for part in parts)
