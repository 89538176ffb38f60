"""Exact match, F1 and contains, by the rules of SQuAD."""

from __future__ import annotations

import pytest

from mlpmem_ds.stages.questions.answer_scores import contains, exact_match, f1, normalized, short_answer


def test_normalization_leaves_words() -> None:
    assert normalized(" The  Eiffel-Tower, a tower! ") == "eiffeltower tower"


@pytest.mark.parametrize(
    "text, short",
    [(" Paris. It is", "Paris"), ("14 December, 1972", "14 December"), ("a\nQ: b", "a"), ("", ""), (".", "")],
)
def test_a_short_answer_ends_where_the_harness_ends_it(text: str, short: str) -> None:
    assert short_answer(text) == short


@pytest.mark.parametrize(
    "text, answers, exact, within, overlap",
    [
        ("The Beatles", ["beatles"], 1, 1, 1),
        ("it was the Beatles band", ["Beatles"], 0, 1, 2 / 5),
        ("beat", ["beatles"], 0, 0, 0),
        ("new york", ["york new", "york"], 0, 1, 1),
        ("red red blue", ["red"], 0, 1, 1 / 2),
        ("", ["x"], 0, 0, 0),
        ("the", ["a"], 1, 0, 1),  # both are articles alone
        ("x", ["the"], 0, 0, 0),
    ],
)
def test_scores(text: str, answers: list[str], exact: float, within: float, overlap: float) -> None:
    assert exact_match(text, answers) == exact
    assert contains(text, answers) == within
    assert f1(text, answers) == pytest.approx(overlap)
