"""A general text of other words, two memories, a second language model, and finished fits; made once a
worker, read-only."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.stages.corpus import prepare_corpus
from mlpmem_ds.stages.gating import fit_gate
from mlpmem_ds.stages.gating.config import Config

from ..evaluation.conftest import save_memory, save_model


class Parts(NamedTuple):
    """What a fit reads."""

    base: Path
    corpus: Path
    general: Path
    memory: Path
    other: Path
    """a second memory of the same base"""
    second: Path
    """a language model of its own, with the base's vocabulary"""


@pytest.fixture(scope="session")
def parts(
    tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, base_dir: Path, keys_dir: Path
) -> Parts:
    root = tmp_path_factory.mktemp("gating")
    text = root / "text"
    text.mkdir()
    for number in range(12):  # other words, so that other tokens
        (text / f"{number}.txt").write_text("oh dear me, what is it now? " * (6 + number), encoding="utf-8")
    config = prepare_corpus.Config(
        input=(str(text),),
        include=("*.txt",),
        tokenizer=str(corpus_dir / "tokenizer"),
        output=root / "general",
        block_size=32,
        stride=16,
        tuning_fraction=0.5,
        test_fraction=0.4,
    )
    prepare_corpus.run(config, World())
    keys, corpus = open_keys(keys_dir), open_corpus(corpus_dir)
    return Parts(
        base=base_dir,
        corpus=corpus_dir,
        general=root / "general",
        memory=save_memory(root / "memory", keys, corpus, seed=1),
        other=save_memory(root / "other", keys, corpus, seed=2),
        second=save_model(base_dir, corpus_dir, root / "second", seed=5),
    )


def make_config(parts: Parts, output: Path, *, num_memories: int = 1, **changes: object) -> Config:
    values: dict[str, object] = {
        "model": str(parts.base),
        "memory": tuple(map(str, (parts.memory, parts.other)[:num_memories])),
        "corpus": (str(parts.corpus),),
        "general": (str(parts.general),),
        "output": output,
        "min_positions": 64,
        "unit_positions": 96,
        "batch_positions": 64,
        "max_epochs": 12,
    }
    return Config(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def fitted(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = make_config(parts, tmp_path_factory.mktemp("fitted") / "gate")
    fit_gate.run(config, World())
    return config


@pytest.fixture(scope="session")
def second_gate(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A fit with the second language model in the memory's place."""
    output = tmp_path_factory.mktemp("second_gate") / "gate"
    config = make_config(parts, output, memory=(), ensemble=str(parts.second))
    fit_gate.run(config, World())
    return config
