"""Scores of documents, by hand."""

from __future__ import annotations

import math

import pytest

from mlpmem_ds.stages.harness.hub_records import truthful_record
from mlpmem_ds.stages.harness.task_scores import chances, open_answer, truthful

RECORD = truthful_record(
    "why?", {"best": 1, "false": 0}, {"best": 1, "also": 1, "false": 0, "worse": 0, "worst": 0}
)


def test_three_scores_of_an_open_answer() -> None:
    doc = {"answer": ["Paris", "Lutetia"]}
    assert open_answer(doc, ["the Paris. It is old"]) == {"exact_match": 1.0, "f1": 1.0, "contains": 1.0}
    scores = open_answer(doc, ["old Paris, in France"])
    assert scores == {"exact_match": 0.0, "f1": pytest.approx(2 / 3), "contains": 1.0}
    assert open_answer(doc, [""]) == {"exact_match": 0.0, "f1": 0.0, "contains": 0.0}


def test_truthfulness_by_hand() -> None:
    assert RECORD["choices"] == ["best", "false", "also", "worse", "worst"] and RECORD["gold"] == 0
    assert RECORD["mc1"] == [1, 0, -1, -1, -1] and RECORD["mc2"] == [1, 0, 1, 0, 0]
    logs = [-900.0, -901.0, -905.0, -899.0, -910.0]
    found = truthful(RECORD, [(log, False) for log in logs])
    mass = [math.exp(log + 900) for log in logs]
    share = (mass[0] + mass[2]) / sum(mass)
    assert found["mc1"] == 1.0 and found["mc3"] == 0.0  # `worse` stands in the second list alone
    assert found["mc2"] == pytest.approx(share)
    assert found["mean"] == pytest.approx((1 + share) / 3)


def test_chance_is_what_a_guess_scores() -> None:
    assert chances("choices", {}, 4, ("acc", "acc_bytes")) == {"acc": 0.25, "acc_bytes": 0.25}
    found = chances("truthful", RECORD, 5, ("mean",))
    assert (found["mc1"], found["mc2"], found["mc3"]) == (1 / 2, 2 / 5, 1 / 4)
    assert chances("none", {}, 1, ("f1",)) == {}
