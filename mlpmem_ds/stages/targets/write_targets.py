"""`write_targets`: keys (and index) → targets. Each key's neighbours among all keys, as a next-token
distribution.

Phase 1 measures a sample: the temperature that gives the requested neighbour-weight perplexity, or the
perplexity that the given temperature has; an unreachable perplexity and a disk that is too small are refused
before anything is written. Phase 2 is one unit for each shard file. The queries are the stored keys
themselves and a position never finds itself; distances are those of the stored keys also where an index chose
the candidates. With int8 keys they are exact integers, and a row depends on nothing but the keys and the
flags.

V token ids.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block, deal, split_blocks
from mlpmem_ds.core.config import default_of
from mlpmem_ds.core.files import require_free_bytes
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.stage_directory import UnitWriter, check_output, open_stage
from mlpmem_ds.core.typed_json import from_json
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import token_dtype
from mlpmem_ds.formats.index_directory import IndexDirectory
from mlpmem_ds.formats.key_lists import FOLDER
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.formats.target_encoding import frequency_order
from mlpmem_ds.formats.target_shards import TargetShard, shard_name
from mlpmem_ds.formats.targets import ORDER_NAME, ExcludedNeighbours, TargetsManifest
from mlpmem_ds.maths.weighting import Weighting
from mlpmem_ds.stages.retrieval.key_lists import missing_bytes, remove_key_lists
from mlpmem_ds.stages.retrieval.neighbour_search import open_search
from mlpmem_ds.stages.targets import audit as target_audit
from mlpmem_ds.stages.targets.config import AuditConfig, Config
from mlpmem_ds.stages.targets.inputs import (
    check_lists,
    check_sizes,
    open_index_over,
    read_documents,
    resolve_search,
)
from mlpmem_ds.stages.targets.teacher import Teacher
from mlpmem_ds.stages.targets.units import Measured, bytes_per_position, measure, write

_logger = logging.getLogger(__name__)
_WEIGHTING, _ORDER = "weighting", "frequency_order"
_MARGIN_OF_BYTES = 1.05
_SECONDS_BETWEEN_LOOKS = 0.1


def run(config: Config, world: World) -> None:
    keys = open_keys(config.keys)
    search = resolve_search(config, keys)
    index = open_index_over(config, keys) if search == "ivf" else None
    documents_N, inputs = read_documents(config, keys)
    inputs |= {"keys": keys.sha256} | ({"index": index.sha256} if index else {})
    check_sizes(config, keys)
    lists = check_lists(config, keys, index)
    truth = target_audit.open_truth(config.raw_keys, keys) if config.audit is not None else None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    teacher = Teacher(
        keys=keys,
        search=open_search(
            keys,
            index,
            how="lists" if search == "ivf" else "exact",
            nprobe=config.nprobe,
            lists=lists,
            threads=config.threads,
            world=world,
        ),
        k=config.k,
        window=config.exclude_window,
        documents_N=documents_N,
        lists=lists,
    )
    order_V = _frequency_order(teacher) if config.encoding == "compact" else None
    is_new = not check_output(config.output, stage=TargetsManifest.FORMAT)
    measured = _measure_first(teacher, config, order_V, index) if is_new else None
    stage = open_stage(
        config.output,
        stage=TargetsManifest.FORMAT,
        version=TargetsManifest.VERSION,
        config=config,
        inputs=inputs,
        world=world,
        resolved=_resolved(config, search),
    )
    stage.run_units([_WEIGHTING], lambda unit, writer: (measured or measure(teacher, config)).summary)
    stage.wait_for([_WEIGHTING])
    summary = stage.summaries([_WEIGHTING])[0]
    weighting = from_json(
        Weighting,
        summary["weighting"],
        where=str(config.output),
        version=TargetsManifest.VERSION,
    )
    firsts = [_WEIGHTING]
    if order_V is not None:
        firsts.append(_ORDER)
        stage.run_units([_ORDER], lambda unit, writer: writer.array(ORDER_NAME, order_V))
    shards = {
        f"knn-{block.start:012d}": block for block in split_blocks(keys.num_positions, config.shard_positions)
    }
    mine = deal(list(shards.values()), world.rank, world.size)
    progress = Progress(sum(block.size for block in mine), label="targets", unit="positions", world=world)

    def write_shard(unit: str, writer: UnitWriter) -> Mapping[str, Any]:
        return write(teacher, config, shards[unit], weighting, order_V, writer, progress)

    stage.run_units(list(shards), write_shard)
    progress.close()
    units = [*firsts, *shards]

    def describe() -> TargetsManifest:
        return _describe(config, keys, search, summary, weighting, shards, stage.summaries(list(shards)))

    stage.finish(units, describe)
    if config.lists is None and stage.manifest_path.is_file():
        remove_key_lists(config.output / FOLDER)  # ranks that have it mapped may go on
    if truth is None:
        return
    stage.wait_for(units)
    while not stage.manifest_path.is_file():  # another rank is at it, or has died
        stage.finish(units, describe)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    assert config.audit is not None
    target_audit.run(
        AuditConfig(targets=config.output, positions=config.audit),
        world,
        teacher=teacher,
        truth=truth,
    )


def _resolved(config: Config, search: str) -> dict[str, Any]:
    """What decides the targets in place of the flags; one that the others make useless has its default."""
    is_auto = config.temperature == "auto"
    return {
        "search": search,
        "nprobe": config.nprobe if search == "ivf" else default_of(Config, "nprobe"),
        "temperature": "auto" if is_auto else float(config.temperature),
        "neighbour_perplexity": config.perplexity if is_auto else None,
    }


def _measure_first(
    teacher: Teacher, config: Config, order_V: np.ndarray | None, index: IndexDirectory | None
) -> Measured:
    """Before anything is written: the temperature, and whether the targets fit on the disk."""
    measured = measure(teacher, config)
    num_bytes = bytes_per_position(teacher, config, measured, order_V)
    total = num_bytes * teacher.keys.num_positions
    _logger.info(
        "temperature %.4g, neighbour-weight perplexity %.1f: about %.0f bytes a position (%s, %s), %.2f GB",
        measured.weighting.temperature,
        measured.summary["neighbour_perplexity"],
        num_bytes,
        config.encoding,
        config.container,
        total / 1e9,
    )
    needed, what = int(total * _MARGIN_OF_BYTES), "the targets"
    if index is not None and config.lists is None:
        needed, what = (
            needed + missing_bytes(config.output / FOLDER, teacher.keys, index),
            ("the targets and, until they are written, the keys in list order (elsewhere: --lists)"),
        )
    require_free_bytes(config.output, needed, what=what)
    return measured


def _describe(
    config: Config,
    keys: Keys,
    search: Literal["exact", "ivf"],
    measured: dict[str, Any],
    weighting: Weighting,
    shards: dict[str, Block],
    summaries: list[dict[str, Any]],
) -> TargetsManifest:
    return TargetsManifest(
        num_positions=keys.num_positions,
        block_size=keys.manifest.block_size,
        shard_positions=config.shard_positions,
        vocab_size=keys.manifest.vocab_size,
        k=config.k,
        weighting=weighting,
        neighbour_perplexity=measured["neighbour_perplexity"],
        temperature_rule="auto" if config.temperature == "auto" else "fixed",
        mass=config.mass,
        search=search,
        nprobe=config.nprobe if search == "ivf" else None,
        exclude=ExcludedNeighbours(rule=config.exclude, window=config.exclude_window),
        encoding=config.encoding,
        container=config.container,
        entries=sum(summary["entries"] for summary in summaries),
        rows_short_of_k=sum(summary["rows_short_of_k"] for summary in summaries),
        rows_without_neighbours=sum(summary["rows_without_neighbours"] for summary in summaries),
        shards=tuple(
            TargetShard(
                name=shard_name(block.start, block.size, config.container),
                first=block.start,
                count=block.size,
                entries=summary["entries"],
                samples=summary["samples"],
            )
            for block, summary in zip(shards.values(), summaries, strict=True)
        ),
    )


def _frequency_order(teacher: Teacher) -> np.ndarray:
    counts_V = teacher.count_values()
    return frequency_order(counts_V, dtype=token_dtype(len(counts_V)))
