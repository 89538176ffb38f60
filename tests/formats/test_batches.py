"""The reader of batches: a rank's rows of each, read ahead, with inputs that are stored or computed."""

import threading

import numpy as np
import pytest
import torch

from mlpmem_ds.formats.batches import BatchReader, threads_for
from mlpmem_ds.formats.training_order import TrainingOrder
from mlpmem_ds.formats.training_rows import stored_inputs
from mlpmem_ds.maths.sparse_rows import SparseRows

N, BLOCK, WIDTH, VOCABULARY = 203, 16, 3, 11


class FakeKeys:
    """Arrays in memory, with `Keys.read`."""

    def __init__(self):
        generator = np.random.default_rng(0)
        self.arrays = {
            "inputs": generator.integers(0, 1 << 14, (N, WIDTH)).astype(np.uint16),
            "values": np.arange(N) % VOCABULARY,
            "log_probabilities": -generator.random(N).astype(np.float32),
        }

    def read(self, array, start, stop):
        return self.arrays[array][start:stop]

    def read_inputs(self, start, stop):
        return self.arrays["inputs"][start:stop]

    def gather_inputs(self, positions):
        return self.arrays["inputs"][positions]

    def read_inputs_ahead(self, start, stop):
        assert 0 <= start < stop <= N


class FakeTargets:
    """Position p has p mod 4 entries: ids 0 …, probabilities p + id."""

    def read(self, start, stop):
        counts = np.arange(start, stop) % 4
        ids = [np.arange(count) for count in counts]
        probabilities = [position + row for position, row in zip(range(start, stop), ids, strict=True)]
        return SparseRows.from_counts(
            counts, np.concatenate(ids), np.concatenate(probabilities).astype(np.float64)
        )


class Computed:
    """Inputs as if they were computed; what was asked for, and in which threads."""

    def __init__(self, keys, *, is_collective=False):
        self.keys, self.is_collective, self.asked, self.threads = keys, is_collective, [], set()
        self.others = []

    def __call__(self, runs, others=()):
        self.asked.extend(runs)
        self.others.append([list(of_rank) for of_rank in others])
        self.threads.add(threading.current_thread())
        return stored_inputs(
            np.concatenate([self.keys.arrays["inputs"][run.start : run.stop] for run in runs])
        )


def make_order():
    return TrainingOrder(num_positions=N, block_size=BLOCK, window_blocks=3, seed=1)


def reader_of(rank, size, num_micro_batches=1, targets=None, threads=1):
    return BatchReader(
        FakeKeys(),
        targets,
        make_order(),
        batch_positions=12,
        rank=rank,
        size=size,
        num_micro_batches=num_micro_batches,
        with_log_probabilities=True,
        threads=threads,
    )


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_the_union_over_ranks_is_the_order(size, num_micro_batches):
    keys, order = FakeKeys(), make_order()
    for batch in (0, 3, 16, 17, 40):  # 16: across the end of the first epoch
        positions = order.positions(12 * batch, 12 * batch + 12)
        taken = []
        for rank in range(size):
            micro_batches = reader_of(rank, size, num_micro_batches, FakeTargets()).read(batch)
            assert [len(part.inputs_NI) for part in micro_batches] == [
                12 // size // num_micro_batches
            ] * num_micro_batches
            shares = order.shares(batch, 12, rank=rank, size=size)
            mine = np.concatenate([share.positions_m for share in shares])
            taken.extend(mine)
            inputs = torch.cat([part.inputs_NI for part in micro_batches])
            assert inputs.dtype == torch.bfloat16
            np.testing.assert_array_equal(
                inputs.view(torch.int16).numpy(), keys.arrays["inputs"][mine].astype(np.int16)
            )
            rows = [
                (
                    int(label),
                    part.targets.ids[start:stop].tolist(),
                    part.targets.probabilities[start:stop].tolist(),
                )
                for part in micro_batches
                for label, start, stop in zip(
                    part.targets.labels_N,
                    part.targets.offsets_N1[:-1],
                    part.targets.offsets_N1[1:],
                    strict=True,
                )
            ]
            assert rows == [
                (
                    position % VOCABULARY,
                    list(range(position % 4)),
                    [float(position + i) for i in range(position % 4)],
                )
                for position in mine.tolist()
            ]
            logs = torch.cat([part.targets.base_log_probabilities_N for part in micro_batches])
            np.testing.assert_array_equal(logs.numpy(), keys.arrays["log_probabilities"][mine])
        np.testing.assert_array_equal(np.sort(taken), np.sort(positions))
        if size == 1:
            np.testing.assert_array_equal(taken, positions)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_stream_is_the_batches_in_order(threads):
    streamed = [micro_batches[0] for micro_batches, _ in reader_of(1, 2, threads=threads).stream(2, 7)]
    for batch, micro_batch in zip(range(2, 7), streamed, strict=True):
        assert torch.equal(micro_batch.inputs_NI, reader_of(1, 2).read(batch)[0].inputs_NI)
        assert len(micro_batch.targets.ids) == 0  # no targets given: only labels
    assert list(reader_of(0, 1).stream(3, 3)) == []


def test_by_block_ranks_take_contiguous_parts_of_the_same_batches():
    """Also with inputs that are computed for the rows that a rank needs, and for no others."""
    keys = FakeKeys()
    compute = Computed(keys)
    order = TrainingOrder(num_positions=N, block_size=BLOCK, window_blocks=3, seed=1, by_block=True)
    epoch = order.positions(0, N)
    assert sorted(epoch) == list(range(N))
    starts = epoch[np.flatnonzero(np.diff(epoch, prepend=-2) != 1)]
    assert len(starts) > 8 and not (starts % BLOCK).any()

    def batches(size, inputs):
        readers = [
            BatchReader(
                keys,
                FakeTargets(),
                order,
                batch_positions=24,
                rank=rank,
                size=size,
                num_micro_batches=2,
                with_log_probabilities=False,
                inputs=inputs,
            )
            for rank in range(size)
        ]
        parts = [[part for reader in readers for part in reader.read(batch)] for batch in range(20)]
        return torch.cat([torch.cat([part.inputs_NI for part in row]) for row in parts]), torch.cat(
            [torch.cat([part.targets.labels_N for part in row]) for row in parts]
        )

    expected = torch.from_numpy(order.positions(0, 480) % VOCABULARY)
    for size in (1, 2, 3):
        for inputs in (None, compute):
            found, labels = batches(size, inputs)
            assert torch.equal(labels, expected)
            assert torch.equal(found, batches(1, None)[0])
    assert sum(run.size for run in compute.asked) == 3 * 480


def test_what_ranks_compute_together_is_computed_by_all_in_the_thread_that_trains():
    """Each rank is told what all of them need, so that it knows how often they compute; the rest is read
    ahead."""
    keys = FakeKeys()
    order = TrainingOrder(num_positions=N, block_size=BLOCK, window_blocks=3, seed=1, by_block=True)
    alone, together = Computed(keys), [Computed(keys, is_collective=True) for _ in range(3)]
    streams = [
        BatchReader(
            keys,
            None,
            order,
            batch_positions=24,
            rank=rank,
            size=3,
            num_micro_batches=1,
            with_log_probabilities=False,
            inputs=inputs,
        ).stream(0, 20)
        for inputs, rank in ((alone, 1), *zip(together, range(3), strict=True))
    ]
    for (expected, _), *found in zip(*streams, strict=True):
        assert torch.equal(found[1][0][0].inputs_NI, expected[0].inputs_NI)
    assert threading.main_thread() not in alone.threads and alone.others == [[]] * 20
    assert all(compute.threads == {threading.main_thread()} for compute in together)
    assert together[0].others == together[1].others == together[2].others and len(together[0].others) == 20
    for rank, compute in enumerate(together):
        assert [run for batch in compute.others for run in batch[rank]] == compute.asked


def test_positions_that_are_not_finite_are_named():
    keys = FakeKeys()
    keys.arrays["inputs"][[5, 77, 150]] = 0x7FC0  # bfloat16's NaN
    found = []
    for by_block in (False, True):
        order = TrainingOrder(num_positions=N, block_size=BLOCK, window_blocks=3, seed=1, by_block=by_block)
        for rank in range(2):
            reader = BatchReader(
                keys,
                None,
                order,
                batch_positions=8,
                rank=rank,
                size=2,
                num_micro_batches=1,
                with_log_probabilities=True,
            )
            found += [position for batch in range(26) for position in reader.faulty_positions(batch)]
    assert (
        sorted(set(found)) == [5, 77, 150] and 6 <= len(found) <= 8
    )  # the last batch is the next epoch's first rows too


def test_an_error_of_a_reading_thread_reaches_the_training():
    class Broken(FakeTargets):
        def read(self, start, stop):
            raise ValueError("a sample is damaged")

    with pytest.raises(ValueError, match="a sample is damaged"):
        list(reader_of(0, 1, targets=Broken()).stream(0, 9))


def test_a_stream_that_is_left_early_ends_its_threads():
    stream = reader_of(0, 1, targets=FakeTargets(), threads=2).stream(0, 30)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("windows", "batches"))]


def test_ranks_of_one_machine_share_its_cores():
    assert threads_for(1) >= threads_for(2) >= threads_for(10**6) == 1
