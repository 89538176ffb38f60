"""`write_targets`: keys (and index) → targets. Each key's neighbours among all keys, as a next-token
distribution.

First a sample is measured: the temperature that gives the needed neighbour-weight perplexity, or the
perplexity that the given temperature has; an unreachable perplexity and a disk that is too small are refused
before anything is written. Then there is one unit for each shard file. The queries are the stored keys
themselves and a position never finds itself; distances are those of the stored keys also where an index chose
the candidates. With int8 keys they are exact integers, and a row depends on nothing but the keys and the
flags.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.config import default_of
from mlpmem_ds.core.files import require_free_bytes
from mlpmem_ds.core.run_description import check_output
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.typed_json import from_json
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import token_dtype
from mlpmem_ds.formats.lists_directory import FOLDER
from mlpmem_ds.formats.target_shards import TargetShard, shard_name
from mlpmem_ds.formats.targets import ExcludedNeighbours, TargetsManifest
from mlpmem_ds.maths.weighting import Weighting
from mlpmem_ds.stages.retrieval.key_lists import missing_bytes, remove_key_lists
from mlpmem_ds.stages.targets import audit as target_audit
from mlpmem_ds.stages.targets.config import AuditConfig, Config
from mlpmem_ds.stages.targets.inputs import Inputs, open_inputs
from mlpmem_ds.stages.targets.units import RowFormat, Sample, ShardWriter, WeightingRule

_logger = logging.getLogger(__name__)
_WEIGHTING, _ORDER = "weighting", "frequency_order"
_MARGIN_OF_BYTES = 1.05


def run(config: Config, world: World) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    inputs = open_inputs(config, world)
    row_format = RowFormat(
        mass=config.mass,
        encoding=config.encoding,
        container=config.container,
        dtype=token_dtype(inputs.keys.manifest.vocab_size),
        order_V=inputs.order_V,
    )
    rule = WeightingRule(
        kind=config.weighting, temperature=config.fixed_temperature, perplexity=config.perplexity
    )
    sample = Sample(teacher=inputs.teacher, rule=rule, row_format=row_format)
    if not check_output(config.output, stage=TargetsManifest.FORMAT):
        _require_disk(config, inputs, sample)
    stage = open_stage(
        config.output,
        stage=TargetsManifest.FORMAT,
        version=TargetsManifest.VERSION,
        config=config,
        inputs=inputs.hashes,
        world=world,
        resolved=_resolved(config, inputs.search),
    )
    first_units = [_WEIGHTING] if inputs.order_V is None else [_WEIGHTING, _ORDER]
    (summary,) = stage.run_phase([_WEIGHTING], sample.measure)
    stage.run_units(first_units[1:], inputs.write_order)
    measured = _read_sample(stage, summary)
    shard_writer = ShardWriter(
        teacher=inputs.teacher,
        row_format=row_format,
        shard_positions=config.shard_positions,
        batch_positions=config.batch_positions,
        weighting=measured.weighting,
        world=world,
    )
    shards = shard_writer.shards
    stage.run_units(list(shards), shard_writer.write)
    shard_writer.progress.close()
    units = [*first_units, *shards]

    def describe() -> TargetsManifest:
        return _describe(config, inputs, measured, shards, stage.summaries(list(shards)))

    stage.complete(units, describe, wait=inputs.truth is not None)
    if config.lists is None and stage.manifest_path.is_file():
        remove_key_lists(config.output / FOLDER)  # ranks that have it mapped may go on
    if config.audit is not None and inputs.truth is not None:
        audit_config = AuditConfig(targets=config.output, positions=config.audit)
        target_audit.run(audit_config, world, teacher=inputs.teacher, truth=inputs.truth)


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What the record of the sample says; one rank measured it for all."""

    weighting: Weighting
    perplexity: float


def _read_sample(stage: StageDirectory, summary: Mapping[str, Any]) -> _Measured:
    weighting = from_json(
        Weighting, summary["weighting"], where=str(stage.root), version=TargetsManifest.VERSION
    )
    return _Measured(weighting=weighting, perplexity=summary["neighbour_perplexity"])


def _resolved(config: Config, search: str) -> dict[str, Any]:
    """What decides the targets in place of the flags; one that the others make useless has its default."""
    is_auto = config.temperature == "auto"
    return {
        "search": search,
        "nprobe": config.nprobe if search == "ivf" else default_of(Config, "nprobe"),
        "temperature": "auto" if is_auto else float(config.temperature),
        "neighbour_perplexity": config.perplexity if is_auto else None,
    }


def _require_disk(config: Config, inputs: Inputs, sample: Sample) -> None:
    """Before anything is written: the temperature, and whether the targets fit on the disk."""
    summary, num_bytes = sample.summary, sample.bytes_per_position()
    total = num_bytes * inputs.keys.num_positions
    _logger.info(
        "temperature %.4g, neighbour-weight perplexity %.1f: about %.0f bytes a position (%s, %s), %.2f GB",
        sample.weighting.temperature,
        summary["neighbour_perplexity"],
        num_bytes,
        config.encoding,
        config.container,
        total / 1e9,
    )
    needed, what = int(total * _MARGIN_OF_BYTES), "the targets"
    if inputs.index is not None and config.lists is None:
        needed += missing_bytes(config.output / FOLDER, inputs.keys, inputs.index)
        what = "the targets and, until they are written, the keys in list order (elsewhere: --lists)"
    require_free_bytes(config.output, needed, what=what)


def _describe(
    config: Config,
    inputs: Inputs,
    measured: _Measured,
    shards: Mapping[str, Block],
    summaries: list[dict[str, Any]],
) -> TargetsManifest:
    keys = inputs.keys
    return TargetsManifest(
        num_positions=keys.num_positions,
        block_size=keys.manifest.block_size,
        shard_positions=config.shard_positions,
        vocab_size=keys.manifest.vocab_size,
        k=config.k,
        weighting=measured.weighting,
        neighbour_perplexity=measured.perplexity,
        temperature_rule="auto" if config.temperature == "auto" else "fixed",
        mass=config.mass,
        search=inputs.search,
        nprobe=None if inputs.index is None else config.nprobe,
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
