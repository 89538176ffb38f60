"""Targets of other positions: a permutation, without a fixed point, that any read agrees with."""

from types import SimpleNamespace

import numpy as np
import pytest

from mlpmem_ds.formats.permuted_targets import PermutedTargets
from mlpmem_ds.maths.sparse_rows import SparseRows


class NumberedTargets:
    """The row of position p names token p; counts the positions that are read."""

    def __init__(self, num_positions, block_size):
        self.num_positions, self.num_read = num_positions, 0
        self.manifest = SimpleNamespace(num_positions=num_positions, block_size=block_size)

    def read(self, start, stop):
        self.num_read += stop - start
        ids = np.arange(start, stop, dtype=np.int32)
        return SparseRows.from_counts(np.ones(len(ids), np.int64), ids, np.ones(len(ids), np.float32))


@pytest.mark.parametrize(("total", "size"), [(640, 64), (650, 64), (64, 64), (100, 64), (130, 64), (7, 64)])
@pytest.mark.parametrize("seed", [0, 5])
def test_every_target_is_given_once_and_none_to_its_own_position(total, size, seed):
    source = NumberedTargets(total, size)
    permuted = PermutedTargets(source, seed)
    given = permuted.read(0, total).ids
    assert sorted(given) == list(range(total)) and (given != np.arange(total)).all()
    assert source.num_read == total  # each block is read once
    blocks = given // size
    assert all(len(set(blocks[first : first + size])) == 1 for first in range(0, total, size))


def test_any_read_gives_the_same_and_a_seed_another():
    permuted = PermutedTargets(NumberedTargets(650, 64), 3)
    whole = permuted.read(0, 650).ids
    for start, stop in ((0, 1), (63, 65), (10, 640), (600, 650), (128, 192), (649, 650)):
        assert np.array_equal(permuted.read(start, stop).ids, whole[start:stop])
    other = PermutedTargets(NumberedTargets(650, 64), 4).read(0, 650).ids
    assert (other != whole).mean() > 0.9
