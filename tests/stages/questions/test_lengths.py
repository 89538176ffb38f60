"""Answers and choices that leave no token for a question are found before a model is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.lm_eval import encode_pair
from mlpmem_ds.engines.tokenizer import open_encoder
from mlpmem_ds.formats.question_files import Question
from mlpmem_ds.stages.questions.lengths import (
    ContextLimit,
    check_questions,
    fault_of_answers,
    fault_of_choice,
)


@pytest.fixture(scope="module")
def limit(corpus_dir: Path) -> ContextLimit:
    encoder = open_encoder(AutoTokenizer.from_pretrained(corpus_dir / "tokenizer"), label="toy")
    return ContextLimit(flag="--control other", encoder=replace(encoder, begin_ids=(0,)), context=64)


def test_an_answer_leaves_room_for_a_question(limit: ContextLimit) -> None:
    assert fault_of_answers(limit, 62) is None
    assert "answers have up to 63 tokens, and the model reads 64" in str(fault_of_answers(limit, 63))


def test_a_choice_leaves_room_for_a_question(limit: ContextLimit) -> None:
    seen = set()
    for count in range(1, 64):
        text = " é" * count
        length = len(encode_pair(limit.encoder, "q", text)[1])
        assert (fault_of_choice(limit, "q", text) is None) == (length < 63), length
        seen.add(length < 63)
    assert seen == {True, False}


def test_the_place_is_named(limit: ContextLimit) -> None:
    short = Question(kind="choice", prompt="q", answers=("a", "b"))
    long = replace(short, answers=("a", "é " * 64))
    check_questions("set", [short, short], [limit], 16)
    with pytest.raises(UserError, match="--questions set, question 2, --control other: a choice has"):
        check_questions("set", [short, long], [limit], 16)
    asked = Question(kind="open", prompt="q", answers=("é " * 64,))  # which is compared, and never read
    check_questions("set", [asked], [limit], 16)
    with pytest.raises(UserError, match="--questions set, --control other: answers have up to 63 tokens"):
        check_questions("set", [asked], [replace(limit, context=99), limit], 63)
