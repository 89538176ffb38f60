"""The page says where each arm's λ is from: this tuning split, another report, or a gate."""

from __future__ import annotations

from typing import Any

from mlpmem_ds.formats.gates import WeightFigures
from mlpmem_ds.stages.report.page import render_report

from ..conftest import make_arm, make_curve, make_evaluation

WEIGHTS = {
    split: WeightFigures(means=(0.25,), mean=0.25, quantiles=(0.0, 0.1, 0.2, 0.4, 0.9))
    for split in ("tuning", "test")
}
BASE = make_arm("base", 20.0)
MIXED = make_arm(
    "base+knn_exact",
    18.0,
    lmbda=0.5,
    chosen={"neighbours": 8},
    tried={"neighbours": (2, 8)},
    tuning_curve=make_curve({0.0: 20.0, 0.5: 18.0, 1.0: 30.0}),
)
BANK = make_arm("base+bank", 17.0, lmbda=0.3, chosen={"lambda_a": 0.1, "lambda_b": 0.2}, weights=WEIGHTS)
GATED = make_arm("base+memory+gate", 16.0, weights=WEIGHTS)


def page_of(*arms: Any, **changes: Any) -> str:
    return " ".join(render_report(make_evaluation(BASE, *arms, **changes)).split())


def test_a_choice_is_said_to_be_of_the_tuning_split_that_it_was_made_on() -> None:
    page = page_of(MIXED, BANK)
    assert "λ was chosen on the tuning split (700 tokens)" in page
    assert "λ 0.5, neighbours 8 (of 2, 8; the largest that was tried)" in page
    assert "λ 0.3 in all, the best weights on that split: a 0.1, b 0.2" in page
    assert "how λ was chosen (but for gates and banks): the same 3 values on the same tuning split" in page
    assert "how λ was chosen: the same 3 values" in page_of(MIXED)


def test_a_choice_of_another_report_is_said_to_be_its() -> None:
    page = page_of(MIXED, BANK, choices_from="run/report")
    assert "what else it leaves open, from the report `run/report`" in page
    assert "- `base+knn_exact`: λ 0.5, neighbours 8 - " in page
    assert "λ 0.3 in all, the weights of that report: a 0.1, b 0.2" in page
    assert "where λ was chosen: in `run/report`" in page
    assert "the circle is the λ that was chosen in another report" in page
    for untrue in ("was chosen on the tuning split", "the best of", "values on the same", "that was tried"):
        assert untrue not in page


def test_only_an_arm_with_a_gate_has_a_lambda_of_its_own_at_each_token() -> None:
    assert "the same weight λ for every token. Another name" in page_of(MIXED, BANK)
    page = page_of(MIXED, GATED)
    assert "the same weight λ for every token, but for arms with a gate" in page
    assert "- `base+memory+gate`: a gate gives λ at each token" in page
