"""Part of `plan`: what each stage does, counted from the sizes alone: operations, bytes moved, files.

No rate of any machine is in it, so a run on any machine can be compared with it; the tests do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlpmem_ds.core.verified_inputs import num_records
from mlpmem_ds.maths.kmeans import TWO_LEVEL_ABOVE
from mlpmem_ds.stages.index.factory import training_operations
from mlpmem_ds.stages.planning.sizes_on_disk import (
    corpus_bytes,
    index_bytes,
    key_bytes,
    list_bytes,
    memory_bytes,
    target_bytes,
)
from mlpmem_ds.stages.planning.workload import Machine, Workload

LIST_IMBALANCE = 1.3
"""keys met in the lists that a query probes, over keys of as many average lists"""
SAMPLE = 1000
"""positions of targets that are measured first"""
_POSITIONS_OF_CORPUS_UNIT = 8 << 20  # 32 MB of text at 4 bytes a token
_OTHER_FILES_OF_CORPUS = 5  # the tokenizer's two, the list of what was left out, and their records
_WEIGHT_BYTES, _BYTES_OF_WEIGHTS_FILE = 4, 5e9


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Bytes of all ranks together.

    Attributes:
        read: from the disk, what fits in memory once.
        written: to it, also what is removed at the end.
        hashed: compared with checksums, or given one, apart from what is written.
    """

    read: float
    written: float
    hashed: float


def pairs_compared(stage: str, work: Workload) -> float:
    """Distances that are computed: between keys and centroids, and between queries and keys."""
    if stage == "index":
        trained = training_operations(work.index, work.positions, work.dim) / (2.0 * work.dim)
        return trained + work.positions * work.num_lists
    if stage != "targets":
        return 0.0
    queries = work.positions + min(SAMPLE, work.positions)
    if work.search == "exact":
        return float(queries) * work.positions
    return queries * (work.num_lists + candidates(work))


def candidates(work: Workload) -> float:
    """Keys that a query of list search is compared with."""
    return keys_of_probes(work.positions, num_lists=work.num_lists, nprobe=work.nprobe)


def keys_of_probes(positions: int, *, num_lists: int, nprobe: int) -> float:
    """Of so many keys, those in the lists that a query probes."""
    return min(positions, LIST_IMBALANCE * nprobe * positions / num_lists)


def owners_of_query(work: Workload, num_ranks: int) -> float:
    """Ranks that own lists which a query probes, where each owns as many lists side by side.

    Lists trained in one level have no order, and the probes fall on the ranks at random (20.4 of 32 by 32
    probes, measured 20.4); near lists that were trained in two levels lie side by side (measured 10.5).
    """
    at_random = num_ranks * (1 - (1 - 1 / num_ranks) ** work.nprobe)
    return max(1.0, at_random / 2) if work.num_lists > TWO_LEVEL_ABOVE else at_random


def sent_bytes(work: Workload, num_ranks: int) -> float:
    """Of queries and answers of list search, that each rank sends: a query's key and lists to the owners of
    these lists, up to k neighbours back from each."""
    if work.search == "exact" or num_ranks == 1:
        return 0.0
    each = work.dim * work.key_dtype.itemsize + 4 * work.nprobe + 8 + 8 * work.k
    return work.positions / num_ranks * owners_of_query(work, num_ranks) * each


def operations(stage: str, work: Workload) -> float:
    """Multiplications and additions of matrix products; attention's own are left out (6 % at 1.5e9
    parameters and windows of 1,024 tokens)."""
    if stage in ("index", "targets"):
        return 2.0 * work.dim * pairs_compared(stage, work)
    if stage == "keys":
        return body_operations(work) + 2.0 * work.vocab_size * work.width * work.positions
    if stage == "memory":
        trained = float(work.memory.training_flops()) * work.positions
        online = body_operations(work) if work.input_codec == "none" else 0.0
        return work.epochs * (trained + online)
    return 0.0


def body_operations(work: Workload) -> float:
    """Of one pass of the base without its output head over all positions."""
    return 2.0 * max(0, work.parameters - work.vocab_size * work.width) * work.tokens_read


def moved(stage: str, work: Workload, machine: Machine) -> Moved:
    """The bytes that a stage reads, writes and hashes."""
    keys = float(work.stored_key_bytes)
    if stage == "corpus":
        return Moved(read=0.0, written=corpus_bytes(work), hashed=0.0)
    if stage == "keys":
        return Moved(read=corpus_bytes(work), written=key_bytes(work), hashed=corpus_bytes(work))
    if stage == "index":
        return Moved(read=keys, written=index_bytes(work), hashed=keys)
    if stage == "targets":
        lists, values = list_bytes(work), work.positions * work.value_bytes
        index = index_bytes(work) if lists else 0
        # The lists once for the search, the keys once more as its queries.
        read = (2 * keys if lists else keys) + index + values + lists
        return Moved(read=read, written=lists + target_bytes(work), hashed=keys + index + values)
    read = key_bytes(work) - keys + target_bytes(work)
    return Moved(read=max(1.0, work.epochs) * read, written=memory_bytes(work, machine), hashed=0.0)


def num_files(stage: str, work: Workload, *, ranks: int = 1) -> int:
    """That a complete stage leaves, with the records of its units and without logs; of a corpus those of its
    training text, of a training with its checkpoints, to which each of the `ranks` adds a file (with ZeRO 3
    two)."""
    if stage == "corpus":
        return 3 * math.ceil(work.positions / _POSITIONS_OF_CORPUS_UNIT) + _OTHER_FILES_OF_CORPUS
    inputs = {"none": 0, "bf16": 1, "int8": 2}[work.input_codec]
    if stage == "keys":
        units = math.ceil(work.positions / work.unit_positions)
        codec = 4 if work.codec == "int8" else 0
        corpus_units = math.ceil(work.positions / _POSITIONS_OF_CORPUS_UNIT)
        return units * (3 + inputs + 1) + codec + num_records(corpus_units)
    if stage == "index":
        units = math.ceil(work.positions / work.unit_positions)
        return 2 * (work.num_shards + 1) + num_records(units)
    if stage == "targets":
        order = 2 if work.encoding == "compact" else 0
        return 3 * math.ceil(work.positions / work.shard_positions) + 1 + order
    weights = math.ceil(_WEIGHT_BYTES * work.memory.num_parameters() / _BYTES_OF_WEIGHTS_FILE)
    listed = weights + int(weights > 1) + 2  # an index of several, their configuration and record
    values_and_inputs = math.ceil(work.positions / work.unit_positions) * (1 + inputs)
    return work.keep_checkpoints * (ranks + 2) + listed + num_records(values_and_inputs)
