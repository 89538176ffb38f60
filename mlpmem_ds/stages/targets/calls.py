"""Shards of ranks that search together: what is missing is dealt out, and all ranks take part in each call.

Every rank works out from the same list how many calls there will be, so that a rank that has written its
shards still answers for its lists until the last one is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlpmem_ds.core.blocks import deal
from mlpmem_ds.core.host import machine_id
from mlpmem_ds.core.stage_directory import StageDirectory
from mlpmem_ds.engines.collectives.opening import Exchange
from mlpmem_ds.engines.collectives.ranks import Ranks
from mlpmem_ds.engines.devices import free_host_bytes
from mlpmem_ds.stages.retrieval.list_owners import ListOwners, positions_of_a_call
from mlpmem_ds.stages.retrieval.list_search import ListSearch
from mlpmem_ds.stages.targets.units import ShardWriter

_SHARE_OF_MEMORY = 0.6  # of what is free on a host, for the lists in its page cache


def write_together(stage: StageDirectory, writer: ShardWriter, ranks: Ranks, search: ListSearch) -> None:
    """Write the shards that are missing, each by one rank, searched by all. Called by all ranks."""
    units = list(writer.shards)
    missing = set(stage.missing_units(units))
    mine = deal(units, ranks.rank, ranks.size)
    damaged = [unit for unit in mine if unit not in missing and stage.is_damaged(unit)]
    incomplete = {unit for part in ranks.gather([*damaged, *missing]) for unit in part}
    todo = [unit for unit in units if unit in incomplete]
    stage.log_phase(len(units), missing=len(todo))
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


def own_lists(how: Exchange, ranks: Ranks, search: ListSearch, num_bytes: int) -> bool:
    """Whether the ranks search together, each its group of lists: where the flag says how they exchange, on
    GPUs, on several hosts, or where one host has no room for all lists. Called by all ranks.

    On one host with room the ranks share mapped lists through the page cache, and search alone: each query's
    neighbours are then put in order once and not by each owner, and no rank waits for another.
    """
    if ranks.size == 1 or how != "auto":
        return ranks.size > 1
    seen = ranks.gather((machine_id(), search.device.type, free_host_bytes()))
    is_one_host = len({host for host, _, _ in seen}) == 1
    has_room = num_bytes <= _SHARE_OF_MEMORY * min(free for _, _, free in seen)
    return not (is_one_host and has_room and all(device == "cpu" for _, device, _ in seen))


def num_calls(writer: ShardWriter, units: Sequence[str], num_ranks: int) -> int:
    """Calls of the rank that has most."""
    return max(
        sum(len(writer.calls(writer.shards[unit])) for unit in deal(units, rank, num_ranks))
        for rank in range(num_ranks)
    )
