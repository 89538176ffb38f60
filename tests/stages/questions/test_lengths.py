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
from mlpmem_ds.stages.questions.lengths import Room, check_questions, fault_of_answers, fault_of_choice


@pytest.fixture(scope="module")
def room(corpus_dir: Path) -> Room:
    encoder = open_encoder(AutoTokenizer.from_pretrained(corpus_dir / "tokenizer"), label="toy")
    return Room(flag="--control other", encoder=replace(encoder, begin_ids=(0,)), context=64)


def test_an_answer_leaves_room_for_a_question(room: Room) -> None:
    assert fault_of_answers(room, 62) is None
    assert "answers have up to 63 tokens, and the model reads 64" in str(fault_of_answers(room, 63))


def test_a_choice_leaves_room_for_a_question(room: Room) -> None:
    seen = set()
    for count in range(1, 64):
        text = " é" * count
        length = len(encode_pair(room.encoder, "q", text)[1])
        assert (fault_of_choice(room, "q", text) is None) == (length < 63), length
        seen.add(length < 63)
    assert seen == {True, False}


def test_the_place_is_named(room: Room) -> None:
    short = Question(kind="choice", prompt="q", answers=("a", "b"))
    long = replace(short, answers=("a", "é " * 64))
    check_questions("set", [short, short], [room], 16)
    with pytest.raises(UserError, match="--questions set, question 2, --control other: a choice has"):
        check_questions("set", [short, long], [room], 16)
    asked = Question(kind="open", prompt="q", answers=("é " * 64,))  # which is compared, and never read
    check_questions("set", [asked], [room], 16)
    with pytest.raises(UserError, match="--questions set, --control other: answers have up to 63 tokens"):
        check_questions("set", [asked], [replace(room, context=99), room], 63)
