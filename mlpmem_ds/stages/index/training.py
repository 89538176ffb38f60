"""Part of `build_index`: the lists and codes are trained on a sample of the keys, by one rank or by all.

Ranks that were launched together each read the sample of every size-th unit of the keys; how they share the
training is in maths/kmeans.py. The trained index is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mlpmem_ds.core.hashing import sample_positions
from mlpmem_ds.core.stage_directory import StageDirectory
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.engines.collectives.alone import Alone
from mlpmem_ds.engines.collectives.ranks import Ranks
from mlpmem_ds.formats.index_directory import TRAINED_NAME
from mlpmem_ds.formats.keys import Keys
from mlpmem_ds.maths.kmeans import Share
from mlpmem_ds.stages.index.factory import make_index

TRAINED = "trained"
"""the unit of the trained index"""
_SEED = 1


def train_index(stage: StageDirectory, keys: Keys, factory: str, device: torch.device, ranks: Ranks) -> None:
    """Make the unit `trained`; on return every rank can read its file."""
    if ranks.size > 1 and _train_together(stage, keys, factory, device, ranks):
        return
    stage.run_phase([TRAINED], lambda unit, writer: _train(keys, factory, device, Alone(), writer))


def sample_of_keys(keys: Keys, count: int, ranks: Ranks) -> Share:
    """About `count` keys, of which each rank reads those of every size-th unit."""
    blocks = keys.blocks
    own = range(ranks.rank, len(blocks), ranks.size)
    positions = [sample_positions(keys.num_positions, count, seed=_SEED, block=blocks[unit]) for unit in own]
    counts_U = np.zeros(len(blocks), np.int64)
    counts_U[own] = [len(drawn) for drawn in positions]
    counts_U = ranks.sum(counts_U)
    starts_U = np.cumsum(counts_U) - counts_U
    numbers = [starts_U[unit] + np.arange(counts_U[unit]) for unit in own]
    none = np.empty(0, np.int64)
    return Share(
        vectors_nD=keys.gather("keys", np.concatenate([none, *positions])),
        numbers_n=np.concatenate([none, *numbers]),
        total=int(counts_U.sum()),
    )


def _train(
    keys: Keys, factory: str, device: torch.device, ranks: Ranks, writer: UnitWriter | None
) -> dict[str, Any]:
    """The rank that publishes the result has a writer."""
    index = make_index(factory, keys.dim, keys.num_positions, device)
    sample = sample_of_keys(keys, index.num_training_vectors, ranks)
    index.train(sample, ranks=ranks, seed=_SEED)
    if writer is not None:
        with writer.file(TRAINED_NAME) as path:
            index.write(path)
    return {"training_vectors": sample.total, "num_lists": index.num_lists}


def _train_together(
    stage: StageDirectory, keys: Keys, factory: str, device: torch.device, ranks: Ranks
) -> bool:
    """Rank 0 looks whether the unit is there, or another job is at it, and tells the others; whether it is
    made now."""
    is_begun = False

    def compute(unit: str, writer: UnitWriter) -> Mapping[str, Any]:
        nonlocal is_begun
        is_begun = True
        ranks.gather(True)
        return _train(keys, factory, device, ranks, writer)

    if ranks.rank == 0:
        stage.run_units([TRAINED], compute, take_over=False, read_here=True)
        if not is_begun:
            ranks.gather(False)
    elif ranks.gather(None)[0]:
        _train(keys, factory, device, ranks, None)
    is_made: bool = ranks.gather(ranks.rank == 0 and not stage.missing_units([TRAINED]))[0]
    return is_made
