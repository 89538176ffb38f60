"""The model card's figures say where λ was chosen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mlpmem_ds.stages.conversion.model_card import _quality

from ..conftest import make_arm, make_evaluation


@pytest.mark.parametrize(
    ("choices_from", "place"), [(None, "on a tuning split"), ("run/other", "in another report")]
)
def test_the_card_says_where_lambda_was_chosen(choices_from: str | None, place: str) -> None:
    evaluation = make_evaluation(
        make_arm("base", 20.0), make_arm("base+memory", 18.0, lmbda=0.3), choices_from=choices_from
    )
    inputs: Any = SimpleNamespace(report=SimpleNamespace(evaluation=evaluation))
    text = _quality(inputs)
    assert "| base+memory | 18.00 |" in text and text.endswith(
        f"λ was chosen {place}; the figures are of the test split, at each arm's own λ."
    )
