"""`build_index`: keys → index. Sharded inverted lists with product-quantized vectors.

Phase 1 trains the quantizers on a sample of the keys (one unit, which ranks that were launched together make
together); phase 2 is one unit for each shard, filled from its share of the keys.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block, deal
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.host import host_bytes
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.run_description import reason_of_start, resolved_at_start
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.verified_inputs import verify_inputs
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.ranks import Ranks
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.engines.faiss_library import set_num_threads
from mlpmem_ds.formats.index_directory import (
    TRAINED_NAME,
    IndexManifest,
    IndexShard,
    blocks_of_shard,
    has_codes,
    shard_name,
)
from mlpmem_ds.formats.index_lists import IndexLists
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.stages.index.config import Config
from mlpmem_ds.stages.index.factory import (
    choose_num_shards,
    index_bytes,
    make_index,
    resolve_factory,
    training_operations,
)
from mlpmem_ds.stages.index.training import TRAINED, train_index
from mlpmem_ds.stages.stage_ranks import open_stage_ranks

_logger = logging.getLogger(__name__)
_OPERATIONS_PER_SECOND = 6e11
"""of one core with VNNI, products and selection of 256 dimensions; for the estimate alone"""


def run(config: Config, world: World) -> None:
    """Write the index; see formats/README.md. Ranks share the shards; the quantizers are trained once."""
    keys = open_keys(config.keys)
    factory, num_shards = _resolve(config, keys)
    with open_stage_ranks(config, world, stage=IndexManifest.FORMAT) as ranks:
        _build(config, world, keys, factory, num_shards, ranks)


def _build(config: Config, world: World, keys: Keys, factory: str, num_shards: int, ranks: Ranks) -> None:
    device = device_of_rank("auto", world)
    stage = open_stage(
        config.output,
        stage=IndexManifest.FORMAT,
        version=IndexManifest.VERSION,
        config=config,
        inputs={"keys": keys.sha256},
        world=world,
        resolved={"factory": factory},
        dealer=ranks,
    )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
        set_num_threads(config.threads)
    shards = [f"shard-{shard}" for shard in range(num_shards)]
    if world.size > num_shards:
        _logger.info(
            "%d ranks share %d shards, so that %d have none to fill: --num-shards %d (another --output)"
            " gives each one",
            world.size,
            num_shards,
            world.size - num_shards,
            world.size,
        )
    # Before a quantizer sees them: a flipped byte would be a wrong centroid in silence.
    verify_inputs(stage, keys, [keys.file_name("keys", block.start) for block in keys.blocks], label="keys")
    train_index(stage, keys, factory, device, ranks)
    progress = Progress(
        len(deal(shards, world.rank, world.size)), label="index shards", unit="shards", world=world
    )

    def fill(unit: str, writer: UnitWriter) -> Mapping[str, Any]:
        index = Index.read(config.output / TRAINED_NAME, device=device)
        shard = shards.index(unit)
        blocks = blocks_of_shard(keys.blocks, shard, num_shards)
        write = _write_shard if has_codes(factory) else _write_lists
        summary = write(keys, blocks, index, shard_name(shard, factory), writer)
        progress.advance(1)
        return summary

    stage.run_units(shards, fill)
    progress.close()

    def describe() -> IndexManifest:
        counts = [summary["num_vectors"] for summary in stage.summaries(shards)]
        return IndexManifest(
            factory=factory,
            num_lists=stage.summaries([TRAINED])[0]["num_lists"],
            num_shards=num_shards,
            num_vectors=sum(counts),
            shards=tuple(
                IndexShard(name=shard_name(shard, factory), num_vectors=count)
                for shard, count in enumerate(counts)
            ),
        )

    stage.complete([TRAINED, *shards], describe)


def _resolve(config: Config, keys: Keys) -> tuple[str, int]:
    """The faiss factory string, which these keys can train, and the number of shards; says what was chosen,
    why, and what it will cost."""
    factory, reason = resolve_factory(config.factory, keys.num_positions, keys.dim, host_bytes())
    if config.factory != factory:
        started = resolved_at_start(config.output, "factory")
        if isinstance(started, str) and started != factory and has_codes(started) == has_codes(factory):
            factory, reason = started, reason_of_start(factory)
    try:
        index = make_index(factory, keys.dim, keys.num_positions)
    except ValueError as error:
        raise UserError(f"--factory: {error}") from error
    num_shards = config.num_shards or choose_num_shards(keys.num_positions, index.num_lists)
    if config.num_shards is not None and config.num_shards > keys.num_positions:
        raise UserError(
            f"--num-shards {config.num_shards:,} are more than the {keys.num_positions:,} keys of --keys"
            f" {config.keys}: give fewer, or leave it out"
        )
    cores = config.threads or torch.get_num_threads()
    _logger.info("index %s (%s) in %d shards", factory, reason, num_shards)
    _logger.info(
        "it will take %.2f GB on disk, and about %.0f s of a rank's %d threads to train on %s keys and %.0f s"
        " to place all keys",
        index_bytes(factory, keys.dim, keys.num_positions, num_shards) / 1e9,
        training_operations(index, keys.num_positions, keys.dim) / (_OPERATIONS_PER_SECOND * cores),
        cores,
        f"{min(keys.num_positions, index.num_training_vectors):,}",
        2 * keys.num_positions * index.num_lists * keys.dim / (_OPERATIONS_PER_SECOND * cores),
    )
    return factory, num_shards


def _write_shard(
    keys: Keys, blocks: Sequence[Block], index: Index, name: str, writer: UnitWriter
) -> dict[str, Any]:
    """Codes and ids in the lists, as faiss writes them."""
    for block in blocks:
        index.fill(keys.unit("keys", block.start), np.arange(block.start, block.stop))
    with writer.file(name) as path:
        index.write(path)
    return {"num_vectors": index.num_vectors}


def _write_lists(
    keys: Keys, blocks: Sequence[Block], index: Index, name: str, writer: UnitWriter
) -> dict[str, Any]:
    """The lists alone: 4 bytes a key."""
    numbers, positions = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for block in blocks:
        numbers.append(index.assign(keys.unit("keys", block.start), 1)[:, 0])
        positions.append(np.arange(block.start, block.stop))
    lists = IndexLists.from_numbers(np.concatenate(numbers), np.concatenate(positions), index.num_lists)
    writer.array(name, lists.packed(keys.num_positions))
    return {"num_vectors": len(lists.positions_N)}
