"""Inputs of small trainings: a corpus, its keys, and targets with rows of every kind."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core.config import Flags
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.formats.target_encoding import TargetBlock, pack_block
from mlpmem_ds.formats.target_shards import TargetShard, index_name, shard_name, write_shard
from mlpmem_ds.formats.targets import TargetsManifest
from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.stages.corpus import prepare_corpus
from mlpmem_ds.stages.keys import extract_keys

from ...manifests import targets_manifest

BLOCK = 64  # the last block of the split is shorter


@pytest.fixture(scope="session")
def inputs_dir(text_dir: Path, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus, keys, and over them targets, uneven, gap, short: the last two have a shard without an entry."""
    root = tmp_path_factory.mktemp("training-inputs")
    corpus = prepare_corpus.Config(
        input=(str(text_dir),),
        tokenizer="train:300",
        output=root / "corpus",
        block_size=BLOCK,
        stride=BLOCK // 2,
        max_bytes=2500.0,
    )
    prepare_corpus.run(corpus, World())
    keys = extract_keys.Config(
        model=str(base_dir), corpus=root / "corpus", output=root / "keys", unit_positions=256
    )
    extract_keys.run(keys, World())
    write_targets(root / "targets", open_keys(root / "keys"))
    write_targets(root / "uneven", open_keys(root / "keys"), cuts=(1, 3))
    write_targets(root / "gap", open_keys(root / "keys"), cuts=(1, 3), left_out=1)
    write_targets(root / "short", open_keys(root / "keys"), cuts=(1, 3), left_out=2)
    return root


def write_targets(root: Path, keys: Keys, *, cuts: Sequence[int] = (), left_out: int | None = None) -> None:
    """Random targets, some rows without any, in shards that end before the blocks `cuts`.

    Shard number `left_out` is on disk and not in the manifest.
    """
    num_positions, vocab_size = keys.num_positions, keys.manifest.vocab_size
    generator = np.random.default_rng(0)
    blocks = [
        random_block(generator, first, min(BLOCK, num_positions - first), vocab_size)
        for first in range(0, num_positions, BLOCK)
    ]
    directory = open_stage(
        root,
        stage=TargetsManifest.FORMAT,
        version=TargetsManifest.VERSION,
        config=Flags(),
        inputs={"keys": keys.sha256},
        world=World(),
    )
    shards = []

    def write(unit: str, writer: UnitWriter) -> None:
        for start, stop in itertools.pairwise((0, *cuts, len(blocks))):
            first, count = start * BLOCK, sum(block.count for block in blocks[start:stop])
            name = shard_name(first, count)
            write_shard(root / f".{name}", root / f".{index_name(name)}", blocks[start:stop])
            for file in (name, index_name(name)):
                with writer.file(file) as path:
                    shutil.move(root / f".{file}", path)
            entries = sum(block.entries for block in blocks[start:stop])
            shards.append(
                TargetShard(name=name, first=first, count=count, samples=stop - start, entries=entries)
            )

    directory.run_units(["all"], write)
    listed = [shard for number, shard in enumerate(shards) if number != left_out]
    directory.complete(
        ["all"],
        lambda: targets_manifest(
            num_positions=num_positions, block_size=BLOCK, vocab_size=vocab_size, shards=tuple(listed)
        ),
    )


def random_block(generator: np.random.Generator, first: int, count: int, vocab_size: int) -> TargetBlock:
    """Rows of at most 5 entries."""
    counts = generator.integers(0, 6, count)
    ids = [np.sort(generator.choice(vocab_size, size, replace=False)) for size in counts]
    weights = [generator.dirichlet(np.ones(size)) if size else np.empty(0) for size in counts]
    rows = SparseRows.from_counts(counts, np.concatenate(ids), np.concatenate(weights))
    return pack_block(first, rows, dtype=np.dtype("<u2"))
