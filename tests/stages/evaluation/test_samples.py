"""Samples of text: no row of a padded head, and nothing of the base's own way to choose tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.evaluation import samples
from mlpmem_ds.stages.evaluation.samples import continue_samples

from ...joint_models import joined

ROWS = 320  # of a head for the 300 entries of the toy tokenizer


def test_samples_are_of_the_tokenizers_entries(corpus_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    base = GPT2LMHeadModel(GPT2Config(vocab_size=ROWS, **sizes, initializer_range=0.3)).eval()
    with torch.no_grad():  # tied: the padding is what the base would take
        base.lm_head.weight[300:] *= 9
    base.generation_config = GenerationConfig(repetition_penalty=9.0, min_new_tokens=8, temperature=0.1)
    shape = MemoryConfig(input_size=16, hidden_size=16, intermediate_size=16, num_blocks=1, vocab_size=ROWS)
    joint = joined(base, Memory(shape), lmbda=0.1, input_point=CapturePoint(layer=0))
    tokens: list[list[int]] = []
    continue_batch = samples.continue_batch

    def seen(model: object, prompts: list[list[int]], generation: GenerationConfig) -> list[list[int]]:
        assert "repetition_penalty" not in generation.to_diff_dict()
        rows = continue_batch(model, prompts, generation)
        tokens.extend(rows)
        return rows

    monkeypatch.setattr(samples, "continue_batch", seen)
    corpus = open_corpus(corpus_dir, "test")
    found = continue_samples(base, joint, corpus, 3)
    assert len(found) == 3 and {token for row in tokens for token in row} <= set(range(300))
    prompt = corpus.tokens(0, corpus.num_tokens).tolist()[:8]
    assert base.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, 8:].max() >= 300
