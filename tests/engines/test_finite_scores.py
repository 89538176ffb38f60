"""Scores that are no numbers are refused."""

from __future__ import annotations

import math

import pytest
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.finite_scores import check_finite, refuse_overflow

SAID = "1 of 2 log-probabilities of the model are not finite: its weights are damaged, or --dtype float32"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(value: float) -> None:
    check_finite(torch.tensor([0.0, -100.0]))
    with pytest.raises(UserError, match=SAID):
        check_finite(torch.tensor([0.0, value]))


def test_a_token_that_is_never_taken_is_no_overflow() -> None:
    scores_BV = torch.tensor([[0.0, -math.inf], [1.0, 2.0]])
    assert refuse_overflow(torch.tensor([[1], [2]]), scores_BV) is scores_BV
    for value in (math.nan, math.inf):
        scores_BV[1, 0] = value
        with pytest.raises(UserError, match=SAID):
            refuse_overflow(torch.tensor([[1], [2]]), scores_BV)
