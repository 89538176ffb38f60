"""Shards of ranks that search together: what is missing is dealt out, and all ranks take part in each call.

Every rank works out from the same list how many calls there will be, so that a rank that has written its
shards still answers for its lists until the last one is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlpmem_ds.core.blocks import deal
from mlpmem_ds.core.stage_directory import StageDirectory
from mlpmem_ds.engines.collectives.ranks import Ranks
from mlpmem_ds.stages.retrieval.list_owners import ListOwners, positions_of_a_call
from mlpmem_ds.stages.retrieval.list_search import ListSearch
from mlpmem_ds.stages.targets.units import ShardWriter


def write_together(stage: StageDirectory, writer: ShardWriter, ranks: Ranks, search: ListSearch) -> None:
    """Write the shards that are missing, each by one rank, searched by all. Called by all ranks."""
    units = list(writer.shards)
    missing = set(stage.missing_units(units))
    mine = deal(units, ranks.rank, ranks.size)
    damaged = [unit for unit in mine if unit not in missing and stage.is_damaged(unit)]
    incomplete = {unit for part in ranks.gather([*damaged, *missing]) for unit in part}
    todo = [unit for unit in units if unit in incomplete]
    if not todo:
        return
    owners = ListOwners(search, ranks)
    writer = in_calls(writer, owners, search, ranks.size)
    for unit in deal(todo, ranks.rank, ranks.size):
        stage.make_unit(unit, writer.write)
    nothing_n = np.empty(0, np.int64)
    for _ in range(owners.num_calls, num_calls(writer, todo, ranks.size)):
        writer.teacher.find(nothing_n)
    writer.progress.close()


def in_calls(writer: ShardWriter, owners: ListOwners, search: ListSearch, num_ranks: int) -> ShardWriter:
    """A writer that searches many positions in one call of the owners of `search`'s lists."""
    teacher = replace(writer.teacher, search=owners)
    block_size = teacher.keys.manifest.block_size
    return replace(
        writer,
        teacher=teacher,
        call_positions=positions_of_a_call(num_ranks, teacher.k, search.nprobe, block_size),
        searches_ahead=search.device.type != "cpu",
    )


def num_calls(writer: ShardWriter, units: Sequence[str], num_ranks: int) -> int:
    """Calls of the rank that has most."""
    return max(
        sum(len(writer.calls(writer.shards[unit])) for unit in deal(units, rank, num_ranks))
        for rank in range(num_ranks)
    )
