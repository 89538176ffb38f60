"""A Config of a small extraction, an independent pass over the same text, and a second base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.stages.keys.extract_keys import Config


def result_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "log.jsonl")
    }


@pytest.fixture
def config(base_dir: Path, corpus_dir: Path, tmp_path: Path) -> Config:
    return Config(model=str(base_dir), corpus=corpus_dir, output=tmp_path / "keys", unit_positions=256)


@pytest.fixture(scope="session")
def oracle(base_dir: Path, corpus_dir: Path) -> dict[str, np.ndarray]:
    """One window at a time, with hooks of the test's own: what each layer's MLP reads, and the label
    log-probabilities."""
    corpus = open_corpus(corpus_dir)
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    seen: dict[int, torch.Tensor] = {}
    for index, block in enumerate(model.transformer.h):
        block.mlp.register_forward_pre_hook(lambda _, args, index=index: seen.__setitem__(index, args[0][0]))
    rows: dict[str, list[np.ndarray]] = {"layer0": [], "layer1": [], "log_probabilities": []}
    for window in corpus.windows():
        tokens = torch.from_numpy(corpus.tokens(window.context_start, window.stop))[None]
        with torch.no_grad():
            logits = model(tokens).logits[0]
        wanted = slice(window.start - window.context_start, None)
        values = torch.from_numpy(corpus.values(window.start, window.stop))
        log_probabilities = logits.double().log_softmax(-1)[wanted].gather(1, values[:, None])[:, 0]
        rows["log_probabilities"].append(log_probabilities.numpy())
        for layer in (0, 1):
            rows[f"layer{layer}"].append(seen[layer][wanted].numpy())
    return {name: np.concatenate(parts) for name, parts in rows.items()}


CODECS: dict[str, dict[str, Any]] = {
    "int8, bf16 inputs": {},
    "int8, int8 inputs": {"input_codec": "int8", "dim": 7},
    "int8, no inputs": {"input_codec": "none"},
    "raw float16": {"codec": "raw"},
    "raw bfloat16": {"codec": "raw", "raw_dtype": "bfloat16", "input_codec": "int8"},
    "two models": {"input_model": "other"},
}


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider and deeper base for the same tokenizer, with a padded head."""
    path = tmp_path_factory.mktemp("other") / "base"
    torch.manual_seed(5)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=304, n_positions=64, n_embd=24, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0,
            initializer_range=0.3,
        )
    ).save_pretrained(path)  # fmt: skip
    return path
