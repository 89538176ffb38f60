"""Rows of a training against plain lists."""

import numpy as np
import torch

from mlpmem_ds.formats.training_rows import TrainingRows, finite_rows, micro_batches, stored_inputs
from mlpmem_ds.maths.sparse_rows import SparseRows


def rows_from(first, counts, *, with_logs=True):
    """Position p has the value p, the log-probability -p, and ids 0 … with the probability p."""
    positions = np.arange(first, first + len(counts))
    return TrainingRows(
        values_n=positions.astype(np.uint16),
        log_probabilities_n=-positions.astype(np.float32) if with_logs else None,
        targets=SparseRows.from_counts(
            np.array(counts),
            np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
            np.repeat(positions, counts).astype(np.float32),
        ),
    )


def test_rows_are_gathered_from_parts_in_any_order():
    parts = [rows_from(0, [2, 0, 1]), rows_from(3, [3]), rows_from(4, [0, 1])]
    part_of, row_of = np.array([2, 0, 1, 0, 2]), np.array([1, 2, 0, 1, 0])
    found = TrainingRows.gather(parts, part_of, row_of)
    assert found.values_n.tolist() == [5, 2, 3, 1, 4]
    assert found.log_probabilities_n.tolist() == [-5, -2, -3, -1, -4]
    assert found.targets.counts_n.tolist() == [1, 1, 3, 0, 0]
    assert found.targets.probabilities.tolist() == [5, 2, 3, 3, 3]
    assert found.targets.ids.tolist() == [0, 0, 0, 1, 2]
    joined = TrainingRows.join(parts)
    assert joined.values_n.tolist() == [0, 1, 2, 3, 4, 5]
    assert joined.rows(1, 4).targets.counts_n.tolist() == [0, 1, 3]
    bare = TrainingRows.gather([rows_from(0, [1], with_logs=False)], np.array([0]), np.array([0]))
    assert bare.log_probabilities_n is None


def test_micro_batches_are_equal_parts_over_the_same_inputs():
    bits = np.arange(12, dtype=np.uint16).reshape(6, 2)
    inputs = stored_inputs(bits)
    parts = micro_batches(inputs, rows_from(0, [1, 2, 0, 0, 3, 1]), 3)
    assert [len(part.inputs_NI) for part in parts] == [2, 2, 2]
    assert parts[0].inputs_NI.data_ptr() == inputs.data_ptr() and inputs.dtype == torch.bfloat16
    assert [part.targets.labels_N.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [part.targets.offsets_N1.tolist() for part in parts] == [[0, 1, 3], [0, 0, 0], [0, 3, 4]]


def test_rows_that_are_not_finite_are_found():
    bits = np.zeros((4, 2), np.uint16)
    bits[1, 0] = 0x7FC0  # bfloat16's NaN
    rows = rows_from(0, [1, 1, 1, 2])
    rows.targets.probabilities[3] = np.inf
    rows.log_probabilities_n[0] = np.nan
    (part,) = micro_batches(stored_inputs(bits), rows, 1)
    assert finite_rows(part).tolist() == [False, False, True, False]
