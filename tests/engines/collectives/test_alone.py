"""A world of one exchanges with itself."""

import numpy as np

from mlpmem_ds.engines.collectives.alone import Alone


def test_one_rank_is_a_world():
    with Alone() as ranks:
        array = np.arange(4)
        assert np.array_equal(ranks.sum(array), array) and ranks.sum(array) is not array
        assert ranks.gather("mine") == ["mine"]
        assert np.array_equal(ranks.exchange([array])[0], array)
        assert [ranks.next_number("units") for _ in range(3)] == [0, 1, 2]
        assert ranks.next_number("others") == 0
        ranks.wait()
