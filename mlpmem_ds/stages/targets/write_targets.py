"""`write_targets`: keys (and index) → targets. Each key's neighbours among all keys, as a next-token
distribution.

Before the first file costs nothing: manifests are compared, and the disk by what no targets stay below. Then
the keys are brought into the order of the lists by all ranks (key_lists.py), or compared with their checksums
where all of them are searched. One rank measures a sample for all: the temperature that gives the needed
neighbour-weight perplexity, or the perplexity that the given temperature has, and the bytes of a row. An
unreachable perplexity and a disk that is too small are refused here; the lists stay for the next start. Then
there is one unit for each shard file. The queries are the stored keys themselves and a position never finds
itself; distances are those of the stored keys also where an index chose the candidates. With int8 keys they
are exact integers, and a row depends on nothing but the keys and the flags.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mlpmem_ds.core.array_files import read_array
from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.config import default_of
from mlpmem_ds.core.files import require_free_bytes
from mlpmem_ds.core.run_description import check_output
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.typed_json import from_json
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.alone import Alone
from mlpmem_ds.engines.collectives.ranks import Ranks, RanksLost
from mlpmem_ds.formats.corpus import token_dtype
from mlpmem_ds.formats.lists_directory import FOLDER
from mlpmem_ds.formats.target_shards import TargetShard
from mlpmem_ds.formats.targets import ORDER_NAME, ExcludedNeighbours, TargetsManifest
from mlpmem_ds.maths.weighting import Weighting
from mlpmem_ds.stages.retrieval.key_lists import ListsInUse, missing_bytes
from mlpmem_ds.stages.retrieval.list_owners import ListOwners
from mlpmem_ds.stages.retrieval.list_search import ListSearch
from mlpmem_ds.stages.retrieval.verification import verify_keys
from mlpmem_ds.stages.stage_ranks import exchange_folder, open_stage_ranks
from mlpmem_ds.stages.targets import audit as target_audit
from mlpmem_ds.stages.targets.calls import in_calls, own_lists, write_together
from mlpmem_ds.stages.targets.config import AuditConfig, Config
from mlpmem_ds.stages.targets.inputs import Inputs, open_inputs
from mlpmem_ds.stages.targets.units import (
    SHARD_POSITIONS,
    RowFormat,
    Sample,
    ShardWriter,
    UnreachablePerplexityError,
    WeightingRule,
)

_logger = logging.getLogger(__name__)
_WEIGHTING, _ORDER = "weighting", "frequency_order"
_MIN_BYTES = 8  # of a position's row: no targets are smaller
_MARGIN_OF_BYTES = 1.05


def run(config: Config, world: World) -> None:
    """Write the targets of all positions. A rank that has lost the others, and shared only files with them,
    goes on alone.

    Raises:
        UserError: inputs that do not belong together, too small a disk, or another run's output.
        RanksLost: another rank is gone.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        with open_stage_ranks(config, world, stage=TargetsManifest.FORMAT, leftovers=[FOLDER]) as ranks:
            _run(config, world, ranks)
    except RanksLost as lost:
        if config.exchange != "files":  # the others of a launch by MPI or torch are ended too
            raise
        _logger.warning("%s; meanwhile this rank goes on by itself", lost)
        try:
            _run(config, world, Alone())
        finally:  # what the ranks had for each other goes
            shutil.rmtree(exchange_folder(config.output), ignore_errors=True)


def _run(config: Config, world: World, ranks: Ranks) -> None:
    dealer = ranks if ranks.size > 1 else None
    inputs = open_inputs(config, world, dealer)
    if not check_output(config.output, stage=TargetsManifest.FORMAT, leftovers=[FOLDER]):
        _require_min_disk(config, inputs)
    stage = open_stage(
        config.output,
        stage=TargetsManifest.FORMAT,
        version=TargetsManifest.VERSION,
        config=config,
        inputs=inputs.hashes,
        world=world,
        resolved=_resolved(config, inputs),
        leftovers=[FOLDER],
        dealer=dealer,
    )
    lists_in_use = ListsInUse(config.output)
    try:
        with lists_in_use.hold():
            _write(config, world, inputs, stage, ranks)
    except UnreachablePerplexityError:
        _give_up(stage)
        raise
    if config.lists is None and stage.manifest_path.is_file():
        lists_in_use.remove_unless_held()


def _write(config: Config, world: World, inputs: Inputs, stage: StageDirectory, ranks: Ranks) -> None:
    """All units, the manifest and the audit."""
    search, shared_search = inputs.teacher.search, _search_together(config, inputs, ranks)
    first_units, row_format, measured = _run_first_units(config, inputs, stage, ranks)
    shard_writer = ShardWriter(
        teacher=inputs.teacher,
        row_format=row_format,
        shard_positions=inputs.shard_positions,
        batch_positions=config.batch_positions,
        weighting=measured.weighting,
        world=world,
    )
    shards, file_of = shard_writer.shards, shard_writer.file_of
    _require_disk(config, measured, [shards[unit] for unit in stage.missing_units(list(shards))])
    if shared_search is not None:
        write_together(stage, shard_writer, ranks, shared_search)
    else:
        if isinstance(search, ListSearch) and search.device.type != "cpu":
            # A GPU wants many queries at once and the lists in its memory: a rank alone owns all of them.
            shard_writer = in_calls(shard_writer, ListOwners(search, Alone()), search, 1)
        _prepare_if(stage.missing_units, list(shards), inputs, ranks)
        stage.run_units(list(shards), shard_writer.write)
        shard_writer.progress.close()
    units = [*first_units, *shards]

    def describe() -> TargetsManifest:
        files = {file_of(shard): shard for shard in shards.values()}
        return _describe(config, inputs, measured, files, stage.summaries(list(shards)))

    stage.complete(units, describe, wait=inputs.truth is not None)
    if config.audit is not None and inputs.truth is not None:
        target_audit.run(
            AuditConfig(targets=config.output, positions=config.audit),
            world,
            teacher=inputs.teacher,
            truth=inputs.truth,
            index=inputs.index if any(ranks.gather(search.mapped is None)) else None,
            dealer=ranks if ranks.size > 1 else None,
        )


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What the record of the sample says; one rank measured it for all."""

    weighting: Weighting
    perplexity: float
    bytes_per_position: float


def _run_first_units(
    config: Config, inputs: Inputs, stage: StageDirectory, ranks: Ranks
) -> tuple[list[str], RowFormat, _Measured]:
    """What all shards need: keys compared with their checksums (those of lists are, when the lists are made),
    the order of token ids, the weighting. Returns the names of the units too.

    Raises:
        UnreachablePerplexityError: no temperature gives the perplexity.
    """
    orders = [_ORDER] if config.encoding == "compact" else []
    if inputs.index is None:
        verify_keys(stage, inputs.keys)
    _prepare_if(stage.has_faults, [*orders, _WEIGHTING], inputs, ranks)
    stage.run_phase(orders, inputs.write_order)
    row_format = RowFormat(
        mass=config.mass,
        encoding=config.encoding,
        container=config.container,
        dtype=token_dtype(inputs.keys.manifest.vocab_size),
        order_V=read_array(stage.root / ORDER_NAME) if orders else None,
    )
    rule = WeightingRule(
        kind=config.weighting, temperature=config.fixed_temperature, perplexity=config.perplexity
    )
    sample = Sample(teacher=inputs.teacher, rule=rule, row_format=row_format)
    (summary,) = stage.run_phase([_WEIGHTING], sample.measure)
    return [_WEIGHTING, *orders], row_format, _read_sample(stage, summary)


def _prepare_if(
    need: Callable[[Sequence[str]], object], units: Sequence[str], inputs: Inputs, ranks: Ranks
) -> None:
    """Let all ranks make the lists together before one of them needs them for these units. Rank 0 looks for
    all: two might not see the same."""
    search = inputs.teacher.search
    if isinstance(search, ListSearch) and ranks.gather(ranks.rank == 0 and bool(need(units)))[0]:
        search.prepare_together()


def _search_together(config: Config, inputs: Inputs, ranks: Ranks) -> ListSearch | None:
    """The search that all ranks do together; None where each does its own."""
    search, key_bytes = inputs.teacher.search, inputs.keys.bytes_of("keys")
    is_shared = isinstance(search, ListSearch) and own_lists(config.exchange, ranks, search, key_bytes)
    return search if isinstance(search, ListSearch) and is_shared else None


def _give_up(stage: StageDirectory) -> None:
    """Take everything away but the lists, which cost most and do not depend on what was refused; the identity
    last, so that other flags may follow."""
    logs = sorted(stage.root.glob("log*.jsonl"))
    for path in (
        *(stage.root / name for name in ("done", ORDER_NAME)),
        *logs,
        *(stage.root / name for name in ("run.json", "identity.json")),
    ):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the lists are there, or another rank has removed it
        stage.root.rmdir()


def _read_sample(stage: StageDirectory, summary: Mapping[str, Any]) -> _Measured:
    weighting = from_json(
        Weighting, summary["weighting"], where=str(stage.root), version=TargetsManifest.VERSION
    )
    return _Measured(
        weighting=weighting,
        perplexity=summary["neighbour_perplexity"],
        bytes_per_position=summary["bytes_per_position"],
    )


def _resolved(config: Config, inputs: Inputs) -> dict[str, Any]:
    """What decides the targets in place of the flags; one that the others make useless has its default."""
    is_auto = config.temperature == "auto"
    return {
        "search": inputs.search,
        "nprobe": config.nprobe if inputs.search == "ivf" else default_of(Config, "nprobe"),
        # The shard of most directories goes without saying, so that it is as if no flag were given.
        "shard_positions": None if inputs.shard_positions == SHARD_POSITIONS else inputs.shard_positions,
        "temperature": "auto" if is_auto else float(config.temperature),
        "neighbour_perplexity": config.perplexity if is_auto else None,
    }


def _require_min_disk(config: Config, inputs: Inputs) -> None:
    """Before anything is written: refuse a disk that cannot hold the lists and the smallest of targets."""
    needed, what = _MIN_BYTES * inputs.keys.num_positions, "the targets"
    if inputs.index is not None and config.lists is None:
        needed += missing_bytes(config.output / FOLDER, inputs.keys, inputs.index)
        what = "the targets and, until they are written, the keys in list order (elsewhere: --lists)"
    require_free_bytes(config.output, needed, what=what)


def _require_disk(config: Config, measured: _Measured, missing: Sequence[Block]) -> None:
    """Before rows are written: refuse a disk that cannot hold those of the shards that are missing."""
    num_bytes = measured.bytes_per_position
    total = num_bytes * sum(block.size for block in missing)
    if total:
        _logger.info(
            "temperature %.4g, neighbour-weight perplexity %.1f: about %.0f bytes a position (%s, %s),"
            " %.2f GB",
            measured.weighting.temperature,
            measured.perplexity,
            num_bytes,
            config.encoding,
            config.container,
            total / 1e9,
        )
    require_free_bytes(
        config.output,
        int(total * _MARGIN_OF_BYTES),
        what="the targets",
        remedy="free some space and run again, it goes on from here",
    )


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
        shard_positions=inputs.shard_positions,
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
                name=name,
                first=block.start,
                count=block.size,
                entries=summary["entries"],
                samples=summary["samples"],
            )
            for (name, block), summary in zip(shards.items(), summaries, strict=True)
        ),
    )
