"""Answers and choices that leave no token for a question are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.lm_eval import encode_pair
from mlpmem_ds.engines.suite_tasks import Document, Generation, Request
from mlpmem_ds.engines.tokenizer import open_encoder
from mlpmem_ds.stages.harness.lengths import ContextLimit, check_context


def task_of(generation: Generation | None, *, begin_tokens: bool = True) -> Any:
    return SimpleNamespace(name="toy", generation=generation, metadata={"begin_tokens": begin_tokens})


@pytest.fixture(scope="module")
def limit(export_dir: Path) -> ContextLimit:
    encoder = open_encoder(AutoTokenizer.from_pretrained(export_dir), label="toy")
    return ContextLimit(flag="--model", encoder=replace(encoder, begin_ids=(0,)), context=64)


def test_an_answer_leaves_room_for_a_question(limit: ContextLimit) -> None:
    long = Generation(stops=("\n",), max_new_tokens=63)
    check_context(task_of(replace(long, max_new_tokens=62)), [], limit, None)
    check_context(task_of(long, begin_tokens=False), [], replace(limit, context=65), None)
    check_context(task_of(long), [], limit, 4)
    said = (
        "task toy, --model: answers have up to 63 tokens, and the model reads 64 .* smaller --max-new-tokens"
    )
    with pytest.raises(UserError, match=said):
        check_context(task_of(long), [], limit, None)
    with pytest.raises(UserError, match="up to 100 tokens"):
        check_context(task_of(replace(long, max_new_tokens=4)), [], limit, 100)


def test_a_choice_leaves_room_for_a_question(limit: ContextLimit) -> None:
    texts = [" é" * count for count in range(1, 64)]
    lengths = [len(encode_pair(limit.encoder, "q", text)[1]) for text in texts]
    for text, length in zip(texts, lengths, strict=True):
        document = Document(number=4, record={}, requests=(Request(context="q", continuation=text),))
        if length < 63:
            check_context(task_of(None), [document], limit, None)
        else:
            with pytest.raises(UserError, match=f"toy, item 5, --model: a choice has {length} tokens"):
                check_context(task_of(None), [document], limit, None)
    assert min(lengths) < 63 <= max(lengths)
