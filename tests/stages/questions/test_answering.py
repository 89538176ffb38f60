"""Answers and choices of a model whose scores are no numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.tokenizer import open_encoder
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.stages.questions.answering import answer, score_choices
from mlpmem_ds.stages.questions.arms import ready_answerer

from ...joint_models import joint_that_reads_padding
from ...toy_tokenizers import KINDS
from ..conftest import save_export


def test_an_overflow_is_no_answer(base_dir: Path, corpus_dir: Path, tmp_path: Path) -> None:
    export = save_export(tmp_path / "export", base_dir, corpus_dir, lmbda=0.5)
    model = MemoryAugmentedLM.from_pretrained(export).eval()
    with torch.no_grad():
        model.memory.head.weight.fill_(torch.inf)
    answerer = ready_answerer(model, open_encoder(AutoTokenizer.from_pretrained(export), label="toy"))
    asked = [("for value", ["in", "alpha beta"])]
    said = "log-probabilities of the model are not finite: its weights are damaged, or --dtype float32"
    with pytest.raises(UserError, match=said):
        score_choices(answerer, asked, batch=2)
    with pytest.raises(UserError, match=said):
        answer(answerer, ["for value"], 2)
    model.lmbda = 0.0
    assert len(score_choices(answerer, asked, batch=2)[0]) == len(answer(answerer, ["for value"] * 2, 2))


def test_a_base_that_would_read_the_padding_has_none() -> None:
    encoder = open_encoder(KINDS["byte_level"](), label="toy")
    prompts = ["the fox", "a", "the cat the dog", "b"]
    for base_alone in (False, True):
        model = joint_that_reads_padding(encoder.vocab_size)
        answerer = ready_answerer(model, encoder, base_alone=base_alone)
        alone = [answer(answerer, [prompt], 8, stops=())[0] for prompt in prompts]
        together = answer(answerer, prompts, 8, stops=())
        assert [one.text for one in together] == [one.text for one in alone]
        assert len({one.text for one in alone}) == len(prompts)
