"""Small real parts that many tests read: text, a corpus, a random GPT-2 base, its keys. Made once a session; read-only."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

from mlpmem_ds.core.world import World  # noqa: E402
from mlpmem_ds.stages import extract_keys, prepare_corpus  # noqa: E402

VOCAB_SIZE = 300
BLOCK_SIZE = 32


def write_text(root: Path, *, num_files: int = 24, seed: int = 0) -> Path:
    """A directory of small packages of repetitive source-like text."""
    generator = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "return", "value", "index", "for", "in", "range", "import", "é"]
    for number in range(num_files):
        path = root / f"package{number % 6}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [" ".join(generator.choices(words, k=generator.randint(3, 9))) for _ in range(generator.randint(8, 24))]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def corpus_dir(text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with all four splits; vocabulary 300, blocks of 32, stride 16."""
    output = tmp_path_factory.mktemp("corpus") / "corpus"
    config = prepare_corpus.Config(
        input=(str(text_dir),),
        tokenizer=f"train:{VOCAB_SIZE}",
        output=output,
        block_size=BLOCK_SIZE,
        stride=BLOCK_SIZE // 2,
        tuning_fraction=0.15,
        test_fraction=0.15,
        heldout_fraction=0.2,
        seed=3,
    )
    prepare_corpus.run(config, World())
    return output


def save_base(path: Path, *, seed: int = 0, num_layers: int = 2) -> Path:
    """A random GPT-2 of width 16 for the toy vocabulary."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=64,
        n_embd=16,
        n_layer=num_layers,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="session")
def keys_dir(corpus_dir: Path, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int8 keys of the training split, units of 256 positions, with memory inputs."""
    output = tmp_path_factory.mktemp("keys") / "keys"
    extract_keys.run(
        extract_keys.Config(model=str(base_dir), corpus=corpus_dir, output=output, unit_positions=256), World()
    )
    return output
