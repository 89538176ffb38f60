"""Windows read ahead: which rows, how often, in which threads, and what is let go."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlpmem_ds.formats.training_order import TrainingOrder
from mlpmem_ds.formats.training_windows import Source, Windows
from mlpmem_ds.maths.sparse_rows import SparseRows

BLOCK = 16


class CountedKeys:
    """Values that are the positions; the ranges that were asked for, and in which threads."""

    def __init__(self):
        self.read_runs, self.told, self.threads = [], [], set()

    def read(self, array, start, stop):
        assert array == "values"
        self.read_runs.append((start, stop))
        self.threads.add(threading.current_thread().name.partition("_")[0])
        return np.arange(start, stop)

    def read_inputs_ahead(self, start, stop):
        self.told.append((start, stop))


class CountedTargets:
    def __init__(self):
        self.num_rows = 0

    def read(self, start, stop):
        self.num_rows += stop - start
        return SparseRows.empty(stop - start)


def open_windows(order, pool, *, rank=0, size=1, stop=1 << 40):
    keys, targets = CountedKeys(), CountedTargets()
    source = Source(
        keys=keys,
        targets=targets,
        with_log_probabilities=False,
        num_positions=order.num_positions,
        block_size=BLOCK,
    )
    return Windows(source, order, rank=rank, size=size, stop=stop, pool=pool), keys, targets


@pytest.fixture
def pool():
    with ThreadPoolExecutor(3, thread_name_prefix="windows") as threads:
        yield threads


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_reads_its_part_of_each_window_once(pool, size):
    order = TrainingOrder(num_positions=BLOCK * 256, block_size=BLOCK, window_blocks=64, seed=3)
    batch_positions, num_batches = 256, 16
    for rank in range(size):
        windows, keys, targets = open_windows(
            order, pool, rank=rank, size=size, stop=num_batches * batch_positions
        )
        used = 0
        for batch in range(num_batches):
            shares = order.shares(batch, batch_positions, rank=rank, size=size)
            rows = windows.gather(shares)
            np.testing.assert_array_equal(
                rows.values_n, np.concatenate([share.positions_m for share in shares])
            )
            used += len(rows.values_n)
        assert targets.num_rows == sum(stop - start for start, stop in keys.read_runs)
        assert targets.num_rows <= used * (1 if size == 1 else 2.2), (size, rank)
        assert len(keys.told) >= len(keys.read_runs) / 2
    assert "windows" in keys.threads


def test_a_split_of_one_window_is_read_once_for_all_epochs(pool):
    order = TrainingOrder(num_positions=203, block_size=BLOCK, window_blocks=64, seed=3)
    windows, keys, targets = open_windows(order, pool)
    for batch in range(60):
        windows.gather(order.shares(batch, 12, rank=0, size=1))
    assert targets.num_rows == 203 and keys.read_runs == [(0, 203)]


def test_two_windows_are_held_and_none_is_read_beyond_the_end(pool):
    order = TrainingOrder(num_positions=BLOCK * 60, block_size=BLOCK, window_blocks=10, seed=3)
    windows, _, targets = open_windows(order, pool, stop=BLOCK * 30)
    for batch in range(20):
        windows.gather(order.shares(batch, 24, rank=0, size=1))
        assert len(windows._open) <= 2
    assert targets.num_rows == BLOCK * 30
