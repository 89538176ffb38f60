"""An export of the toy base with two memories, and what is needed to look at it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from mlpmem_ds.formats.corpus import vocabulary_sha256
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig

LAMBDA = 0.4


@pytest.fixture(scope="module")
def export_dir(tmp_path_factory: pytest.TempPathFactory, base_dir: Path, corpus_dir: Path) -> Path:
    """A joint model with the corpus's tokenizer."""
    output = tmp_path_factory.mktemp("viewing") / "export"
    torch.manual_seed(4)
    shape = MemoryConfig(
        input_size=16,
        hidden_size=16,
        intermediate_size=20,
        num_blocks=2,
        vocab_size=300,
        initializer_range=0.4,
    )
    tokenizer = AutoTokenizer.from_pretrained(corpus_dir / "tokenizer")
    MemoryAugmentedLM.from_parts(
        GPT2LMHeadModel.from_pretrained(base_dir).eval(),
        Memory(shape),
        lmbda=LAMBDA,
        input_point=CapturePoint(layer=0),
        vocabulary_sha256=vocabulary_sha256(tokenizer),
    ).save_pretrained(output)
    tokenizer.save_pretrained(output)
    return output
