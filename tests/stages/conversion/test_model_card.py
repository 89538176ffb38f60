"""The model card's figures: where λ was chosen, and none of another mixture than the export's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mlpmem_ds.formats.evaluation import ArmFigures
from mlpmem_ds.stages.conversion.model_card import _figures, _quality, _threshold

from ..conftest import make_arm, make_evaluation


def make_inputs(*arms: ArmFigures, gate: str | None = None, choices_from: str | None = None) -> Any:
    """Of an export at λ = .3 of a memory that the report has, by a gate of this checksum."""
    evaluation = make_evaluation(
        make_arm("base", 20.0), make_arm("base+memory", 18.0, lmbda=0.3), *arms, choices_from=choices_from
    )
    return SimpleNamespace(
        model="some/base",
        report=SimpleNamespace(evaluation=evaluation, inputs={"base+memory": "memory's"}),
        trained=SimpleNamespace(sha256="memory's"),
        lmbda=0.3,
        further=(),
        gate=None if gate is None else SimpleNamespace(sha256=gate),
    )


@pytest.mark.parametrize(
    ("choices_from", "place"), [(None, "on a tuning split"), ("run/other", "in another report")]
)
def test_the_card_says_where_lambda_was_chosen(choices_from: str | None, place: str) -> None:
    text = _quality(make_inputs(choices_from=choices_from))
    assert "| base+memory | 18.00 |" in text and text.endswith(
        f"λ was chosen {place}; the figures are of the test split, at each arm's own λ."
    )


@pytest.mark.parametrize("gate", [None, "own", "third"])
def test_arms_with_another_gate_are_marked(gate: str | None) -> None:
    own, other = (
        make_arm(f"base+memory+{name}", ppl, settings={"gate": name, "kind": "history"})
        for name, ppl in (("own", 17.25), ("other", 16.75))
    )
    inputs = make_inputs(own, other, gate=gate)
    text = _quality(inputs)
    mark = " (not with this model's gate)"
    assert f"| base+memory+own{'' if gate == 'own' else mark} | 17.25 |" in text
    assert f"| base+memory+other{mark} | 16.75 |" in text and "| base+memory | 18.00 |" in text


def test_with_a_threshold_the_figures_are_not_of_this_model() -> None:
    inputs = make_inputs()
    assert [figure.value for figure in _figures(inputs, None)] == [18.0, 1.0, 20.0]
    assert not _figures(inputs, 0.2)
    assert _threshold(inputs, None) == []
    (line,) = _threshold(inputs, 0.2)
    assert "where its weight is below 0.2" in line and "without" in line
    inputs.report = None
    assert "without" not in _threshold(inputs, 0.2)[0]
