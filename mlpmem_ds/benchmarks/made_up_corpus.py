"""A corpus of random tokens for benchmarks: a base reads it at the speed of real text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlpmem_ds.core.config import Flags
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import (
    CorpusManifest,
    CorpusUnit,
    SplitManifest,
    TokenizerFacts,
    token_dtype,
)


def write_made_up_corpus(root: Path, *, positions: int, vocab_size: int, block_size: int) -> Path:
    """A corpus directory with a train split of random tokens, without overlap of the blocks; `root`."""
    directory = open_stage(
        root,
        stage=CorpusManifest.FORMAT,
        version=CorpusManifest.VERSION,
        config=Flags(),
        inputs={"text": "random"},
        world=World(),
    )
    dtype = token_dtype(vocab_size)

    def write(unit: str, writer: UnitWriter) -> None:
        generator = np.random.default_rng(1)
        with writer.file(f"train/tokens-{unit}.bin") as path:
            path.write_bytes(generator.integers(vocab_size, size=positions + 1, dtype=dtype).tobytes())

    def describe() -> CorpusManifest:
        unit = CorpusUnit(unit="00000", tokens=positions + 1, documents=0, bytes=0)
        return CorpusManifest(
            tokenizer=TokenizerFacts(vocabulary_sha256="0" * 64, vocab_size=vocab_size, end_of_document_id=0),
            token_dtype=dtype.str,
            block_size=block_size,
            stride=block_size,
            splits={"train": SplitManifest.from_units([unit])},
        )

    directory.run_units(["00000"], write)
    directory.complete(["00000"], describe)
    return root
