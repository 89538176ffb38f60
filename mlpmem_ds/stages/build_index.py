"""Third stage: keys → index. Sharded inverted lists with product-quantized vectors.

Phase 1 trains the quantizers on a sample of the keys (one unit); phase 2 is one unit for each shard, filled from its share
of the keys.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlpmem_ds.core.blocks import deal
from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.hashing import sample_positions
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.stage_directory import UnitWriter, open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.engines import faiss as engine
from mlpmem_ds.formats.index_directory import FORMAT, TRAINED_NAME, VERSION, blocks_of_shard, shard_name
from mlpmem_ds.formats.keys import Keys, open_keys

_logger = logging.getLogger(__name__)
_TRAINED = "trained"
_SEED = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of tools/build_index.py."""

    keys: Path = option("key directory of extract_keys")
    output: Path = option("index directory to write")
    factory: str = option("faiss index factory that holds IVF, such as IVF1024,PQ64, or auto", "auto")
    num_shards: int = option("files that the keys are spread over, filled by different ranks", 4)
    threads: int = option("CPU threads of each rank, 0 = as the environment says", 0, identity=False)

    def __post_init__(self) -> None:
        if self.num_shards < 1:
            raise UserError(f"--num-shards {self.num_shards} must be at least 1")
        if self.threads < 0:
            raise UserError(f"--threads {self.threads} must be 0 or more")


def run(config: Config, world: World) -> None:
    keys = open_keys(config.keys)
    factory, num_lists = _resolve_factory(config.factory, keys, world)
    stage = open_stage(
        config.output,
        stage=FORMAT,
        version=VERSION,
        config=config,
        inputs={"keys": keys.sha256},
        world=world,
        extra={"factory": factory},
    )
    if config.threads:
        torch.set_num_threads(config.threads)
        engine.set_num_threads(config.threads)
    shards = [f"shard-{shard}" for shard in range(config.num_shards)]
    stage.run_units([_TRAINED], lambda unit, writer: _train(keys, factory, writer))
    stage.wait_for([_TRAINED])
    progress = Progress(len(deal(shards, world.rank, world.size)), label="index shards", unit="shards", world=world)

    def fill(unit: str, writer: UnitWriter) -> Mapping[str, Any]:
        summary = _fill(keys, config.output / TRAINED_NAME, shards.index(unit), config.num_shards, writer)
        progress.advance(1)
        return summary

    stage.run_units(shards, fill)
    progress.close()

    def describe() -> dict[str, Any]:
        counts = [summary["num_vectors"] for summary in stage.summaries(shards)]
        return {
            "factory": factory,
            "num_lists": num_lists,
            "num_shards": config.num_shards,
            "num_vectors": sum(counts),
            "shards": [{"name": shard_name(shard), "num_vectors": count} for shard, count in enumerate(counts)],
        }

    stage.finish([_TRAINED, *shards], describe)


def _resolve_factory(factory: str, keys: Keys, world: World) -> tuple[str, int]:
    """The faiss factory string and its number of lists."""
    reason = "as asked"
    if factory == "auto":
        factory, reason = engine.choose_factory(keys.num_positions, keys.dim)
    try:
        num_lists = engine.check_factory(factory, keys.dim, keys.num_positions)
    except ValueError as error:
        raise UserError(f"--factory: {error}") from error
    _logger.info("index %s (%s)", factory, reason)
    return factory, num_lists


def _train(keys: Keys, factory: str, writer: UnitWriter) -> dict[str, Any]:
    positions = sample_positions(keys.num_positions, engine.num_training_vectors(factory, keys.dim), seed=_SEED)
    index = engine.train(keys.gather("keys", positions), factory, seed=_SEED)
    with writer.file(TRAINED_NAME) as path:
        engine.write_index(index, path)
    return {"training_vectors": len(positions)}


def _fill(keys: Keys, trained: Path, shard: int, num_shards: int, writer: UnitWriter) -> dict[str, Any]:
    index = engine.read_index(trained, for_search=False)
    blocks = blocks_of_shard(keys.blocks, shard, num_shards)
    for block in blocks:
        engine.fill(index, keys.unit("keys", block.start), np.arange(block.start, block.stop))
    with writer.file(shard_name(shard)) as path:
        engine.write_index(index, path)
    return {"num_vectors": sum(block.size for block in blocks)}
