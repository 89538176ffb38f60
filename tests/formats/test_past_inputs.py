"""Stored inputs with those of the positions before, against the states of each window of the base."""

import numpy as np
import pytest
import torch

from mlpmem_ds.core.blocks import split_windows
from mlpmem_ds.formats.past_inputs import KeysWithPast
from mlpmem_ds.models.past_states import with_past

TOTAL, WIDTH = 53, 3


class Stored:
    """Rows in memory, as `Keys` gives them."""

    def __init__(self) -> None:
        self.rows = np.random.default_rng(0).integers(1, 2**16, (TOTAL, WIDTH)).astype(np.uint16)

    def read(self, array, start=0, stop=None):
        return np.arange(TOTAL)[start:stop]

    def read_inputs(self, start=0, stop=None):
        return self.rows[start:stop]

    def gather_inputs(self, positions_n):
        return self.rows[positions_n]

    def read_inputs_ahead(self, start, stop):
        pass


@pytest.mark.parametrize("past", [1, 3, 9])
@pytest.mark.parametrize("stride", [4, 8])
def test_rows_are_those_of_each_window_alone(past, stride):
    stored, windows = Stored(), split_windows(TOTAL, 8, stride)
    keys = KeysWithPast(keys=stored, windows=windows, past=past)
    parts = [
        with_past(torch.from_numpy(stored.rows[window.start : window.stop].astype(np.int64)), past)
        for window in windows
    ]
    expected = torch.cat(parts).numpy()
    np.testing.assert_array_equal(keys.read_inputs(), expected)
    for start, stop in ((0, 1), (3, 20), (8, 9), (21, TOTAL)):
        np.testing.assert_array_equal(keys.read_inputs(start, stop), expected[start:stop])
    positions = np.random.default_rng(1).permutation(TOTAL)
    np.testing.assert_array_equal(keys.gather_inputs(positions), expected[positions])
    assert (stored.rows > 0).all()  # nothing is written into what is stored
    np.testing.assert_array_equal(keys.read("values", 2, 5), [2, 3, 4])
