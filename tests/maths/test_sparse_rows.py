"""Sparse rows against plain lists: take, cut, join, and the bounds where there is nothing."""

import numpy as np
import pytest
import torch

from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.maths.sparse_targets import TargetBatch

COUNTS = np.array([2, 0, 3, 1, 0])


def make_rows() -> SparseRows:
    return SparseRows.from_counts(
        COUNTS,
        np.arange(6, dtype=np.int32),
        np.linspace(0.1, 0.6, 6, dtype=np.float32),
        np.arange(5, dtype=np.float32),
    )


def as_lists(rows: SparseRows) -> list[tuple[list[int], list[float], float]]:
    assert rows.offsets.dtype == np.int64 and rows.offsets[0] == 0
    assert rows.offsets[-1] == len(rows.ids) == len(rows.probabilities)
    assert rows.num_rows == len(rows.dropped)
    return [
        (rows.ids[start:stop].tolist(), rows.probabilities[start:stop].tolist(), float(dropped))
        for start, stop, dropped in zip(rows.offsets[:-1], rows.offsets[1:], rows.dropped, strict=True)
    ]


def test_counts_and_rows_of_entries() -> None:
    rows = make_rows()
    assert rows.offsets.tolist() == [0, 2, 2, 5, 6, 6]
    assert rows.counts_n.tolist() == COUNTS.tolist()
    assert rows.row_of_E.tolist() == [0, 0, 2, 2, 2, 3]


@pytest.mark.parametrize("indices", [[], [2], [4, 1], [3, 0, 0, 2], [0, 1, 2, 3, 4]])
def test_take_gives_the_rows_in_their_order(indices: list[int]) -> None:
    rows = make_rows()
    taken = rows.take(np.array(indices, np.int64))
    assert as_lists(taken) == [as_lists(rows)[index] for index in indices]
    assert taken.ids.dtype == np.int32 and taken.probabilities.dtype == taken.dropped.dtype == np.float32


def test_gather_takes_rows_of_several_parts_in_any_order() -> None:
    parts = [make_rows().rows(0, 2), make_rows().rows(2, 5)]
    whole = as_lists(make_rows())
    part_of, row_of = np.array([1, 0, 1, 1, 0, 1]), np.array([2, 1, 0, 0, 0, 1])
    found = SparseRows.gather(parts, part_of, row_of)
    assert as_lists(found) == [whole[index] for index in (4, 1, 2, 2, 0, 3)]
    assert found.ids.dtype == np.int32 and found.probabilities.dtype == np.float32
    assert as_lists(SparseRows.gather(parts, part_of[:0], row_of[:0])) == []


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (0, 0), (1, 2), (2, 4), (5, 5), (3, 5)])
def test_cut_gives_the_rows_of_the_range(start: int, stop: int) -> None:
    rows = make_rows()
    assert as_lists(rows.rows(start, stop)) == as_lists(rows)[start:stop]


@pytest.mark.parametrize("cuts", [[0, 5], [0, 1, 5], [0, 0, 2, 2, 4, 5]])
def test_join_undoes_cuts(cuts: list[int]) -> None:
    rows = make_rows()
    joined = SparseRows.join([rows.rows(*ends) for ends in zip(cuts[:-1], cuts[1:], strict=True)])
    assert as_lists(joined) == as_lists(rows)
    assert joined.ids.dtype == np.int32 and joined.probabilities.dtype == np.float32


def test_rows_without_entries() -> None:
    assert as_lists(SparseRows.empty(2)) == [([], [], 0.0), ([], [], 0.0)]
    assert as_lists(SparseRows.empty(0)) == []
    joined = SparseRows.join([SparseRows.empty(1), SparseRows.empty(2)])
    assert joined.num_rows == 3 and joined.ids.dtype == np.int64


def test_a_batch_of_the_loss_is_made_of_rows() -> None:
    batch = TargetBatch.from_rows(make_rows(), np.array([5, 0, 1, 2, 3], np.uint16))
    assert batch.offsets_N1.tolist() == [0, 2, 2, 5, 6, 6]
    assert batch.ids.dtype == batch.labels_N.dtype == torch.int64
    assert batch.probabilities.dtype == torch.float32 and batch.base_log_probabilities_N is None
    labels = TargetBatch.from_labels(torch.tensor([4, 4]))
    assert labels.offsets_N1.tolist() == [0, 0, 0] and not len(labels.ids)
