"""States with those of the positions before, against a loop."""

import pytest
import torch

from mlpmem_ds.models.past_states import with_past


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("past", [0, 1, 3])
def test_each_row_has_the_rows_before_it_and_zeros_before_the_first(count: int, past: int) -> None:
    states = torch.randn(count, 5)
    rows = []
    for position in range(count):
        earlier = [position - steps for steps in range(past, -1, -1)]
        rows.append(torch.cat([states[at] if at >= 0 else torch.zeros(5) for at in earlier]))
    assert torch.equal(with_past(states, past), torch.stack(rows))
