"""Prompts of different lengths that are continued together: each is as alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from mlpmem_ds.stages.generation.config import Config
from mlpmem_ds.stages.generation.exported_model import load_model
from mlpmem_ds.stages.generation.generate import (
    _batches,
    _continue_all,
    _generation_config,
    continue_batch,
)

from ...joint_models import joint_that_reads_padding

PROMPTS = ("alpha beta return", "in", "for value in range import é gamma")
NEW = 12


def test_prompts_of_a_batch_do_not_see_their_padding(
    export_dir: Path, tmp_path: Path, generate: Callable[..., str]
) -> None:
    """Padding is the end token here, on the right by the tokenizer's own settings, which also cut texts."""
    copy = shutil.copytree(export_dir, tmp_path / "export")
    words = AutoTokenizer.from_pretrained(copy, padding_side="right", truncation_side="left")
    words.pad_token = words.eos_token
    words.backend_tokenizer.enable_truncation(2)
    words.backend_tokenizer.enable_padding(length=20)
    words.save_pretrained(copy)
    flags = ["--prompt", *PROMPTS, "--max-new-tokens", NEW]
    assert generate(*flags, model=copy) == generate(*flags)


@pytest.mark.parametrize("rule", [{"no_repeat_ngram_size": 1}, {"repetition_penalty": 1000.0}])
def test_padding_is_none_of_the_tokens_that_are_not_to_be_repeated(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any]
) -> None:
    """Padding is the end token here: transformers would hold it back where a prompt is padded (by the
    penalty: releases as late as 5.20, which do not tell it where a prompt begins)."""
    monkeypatch.setattr(
        "transformers.generation.utils.RepetitionPenaltyLogitsProcessor",
        lambda penalty, prompt_ignore_length=None: RepetitionPenaltyLogitsProcessor(penalty),
    )
    model = load_model(str(export_dir), device=torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(export_dir)
    ids = [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    config = Config(model=str(export_dir), prompt=PROMPTS, max_new_tokens=NEW, **rule)
    generation = _generation_config(config, model, tokenizer)
    [free] = continue_batch(model, ids[1:2], generation)
    generation.eos_token_id = generation.pad_token_id = free[2]
    alone = [continue_batch(model, [row], generation)[0] for row in ids]
    assert alone[1] == free[:2] and len({len(row) for row in ids}) == 3
    assert _continue_all(config, model, tokenizer, ids, model.gate, generation, None) == alone
    rows = [[1], [2, 2], [3], [4], [5, 5]]
    assert _batches(rows, 2, equal_lengths=False) == [[0, 1], [2, 3], [4]]
    assert _batches(rows, 2, equal_lengths=True) == [[0, 2], [3], [1, 4]]


def test_a_base_that_would_read_the_padding_has_none() -> None:
    model = joint_that_reads_padding(67)
    generation = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    ids = [[5, 6], [7, 8, 9, 10, 11, 12, 13], [14, 15]]
    for each in (model, model.base):
        alone = [continue_batch(each, [row], generation)[0] for row in ids]
        assert continue_batch(each, ids, generation) == alone
