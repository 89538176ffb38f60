"""Part of `plan`: memory of one rank in each stage.

The host's; what a GPU holds is apart (`gpu_bytes`). Of index and targets a rank's own, without the files that
it maps: those are shared by the ranks of a machine, and more memory than that only saves reading. Measured
with docs/LAB.md, "plan".
"""

from __future__ import annotations

import math

from mlpmem_ds.formats.lists_directory import RUN_POSITIONS
from mlpmem_ds.maths.knn import KEY_BLOCK, QUERY_BLOCK
from mlpmem_ds.maths.listed_keys import ID_AND_NORM_BYTES
from mlpmem_ds.stages.planning.counts import LIST_IMBALANCE, SAMPLE
from mlpmem_ds.stages.planning.sizes_on_disk import index_bytes
from mlpmem_ds.stages.planning.workload import Machine, Workload
from mlpmem_ds.stages.retrieval.list_owners import SHARE_OF_MEMORY, positions_of_a_call

_PROCESS_BYTES = 300_000_000  # Python with torch, NumPy and faiss imported, with the libraries' files
_PRIVATE_PROCESS_BYTES = 157_000_000  # … and without them
_CANDIDATE_BYTES = 4 * 2**24  # the buffer of list search, of a worker
_BATCH_POSITIONS = 16384
_MAX_WORKERS = 8  # threads of write_targets that share a batch
_ROW_BYTES = 80_000_000  # rows being weighed and written, of a worker
# Of a worker, in addition to its candidates: assigned lists, copies of queries and ids, the selection.
_LIST_SEARCH_BYTES = 150_000_000
_GATHERED_BYTES = 2**28  # keys of the sample's lists, before the keys lie list by list
_CODE_SAMPLE = 1 << 16  # vectors that are float32 at once while codes are trained
_TRAINING_BYTES = 18  # of a parameter, over the ranks with ZeRO-3: weights, gradients, the optimizer's state
_WINDOWS_KEPT = 2  # by the training's reader: the one that batches lie in, and the next
_ENTRY_IN_MEMORY, _ROW_IN_MEMORY = 8, 14  # bytes of a decoded target's entry, and of its row
_BATCH_WINDOWS = 16  # of extraction
_BATCHES_KEPT = 3  # the one in training, and two that are read meanwhile


def index_memory(work: Workload, machine: Machine) -> int:
    """Bytes of the rank that trains: the sample, a part of it as float32; then a shard. Keys are mapped."""
    key = work.dim * work.key_dtype.itemsize
    sample = min(work.positions, work.index.num_training_vectors)
    floats = min(sample, max(_CODE_SAMPLE, work.num_lists)) * work.dim * 4
    shard = index_bytes(work) // work.num_shards
    return _PRIVATE_PROCESS_BYTES + max(sample * key + 2 * floats, 3 * shard // 2)


def target_memory(work: Workload, machine: Machine) -> int:
    """Bytes of a rank, keys mapped: the batch's neighbours, which its workers share, and what each compares.

    With lists also the sample that is searched first and the run of keys that is being put in order; of ranks
    that search together the answers of a call, and on CPUs the keys of the rank's group of lists.
    """
    key = work.dim * work.key_dtype.itemsize
    batch = min(_BATCH_POSITIONS, work.positions)
    workers = min(machine.cores, _MAX_WORKERS)
    neighbours = 8 * batch * work.k
    if work.search == "exact":
        comparing = 13 * QUERY_BLOCK * KEY_BLOCK + 8 * QUERY_BLOCK * (work.k + KEY_BLOCK)
        values = work.value_bytes * work.positions
        return _PRIVATE_PROCESS_BYTES + values + workers * (comparing + _ROW_BYTES) + neighbours
    list_size = work.positions / work.num_lists
    candidates = 4 * round(batch * LIST_IMBALANCE * work.nprobe * list_size)
    probes = min(candidates, workers * _CANDIDATE_BYTES) / 4 / list_size
    # Of the lists that a block probes, and their copy in one array.
    ids = workers * 16 * min(work.positions, _CANDIDATE_BYTES // 4)
    searching = (
        min(candidates, workers * _CANDIDATE_BYTES) + round(probes * key) + ids + workers * _LIST_SEARCH_BYTES
    )
    sampling = min(_GATHERED_BYTES, work.positions * key) + min(
        candidates * SAMPLE // batch, _CANDIDATE_BYTES
    )
    ordering = 28 * min(work.positions, RUN_POSITIONS)
    searching += call_bytes(work, machine) + group_bytes(work, machine)
    return _PRIVATE_PROCESS_BYTES + max(neighbours + searching, sampling + 8 * SAMPLE * work.k * 6, ordering)


def call_bytes(work: Workload, machine: Machine) -> int:
    """Neighbours that a rank finds for others, and others for it, in one call of list search."""
    if machine.ranks == 1:
        return 0
    queries = positions_of_a_call(machine.ranks, work.k, work.nprobe, work.block_size)
    own = min(queries, -(-work.positions // machine.ranks))
    return 8 * work.k * own * (machine.ranks + min(machine.ranks, work.nprobe))


def group_bytes(work: Workload, machine: Machine) -> int:
    """Keys of a rank's group of lists in its own memory; a GPU's hold them where there is one, and they stay
    in their mapped files where there is one run of them, or too little memory."""
    if machine.ranks == 1 or machine.gpus or work.positions <= RUN_POSITIONS:
        return 0
    each = work.dim * work.key_dtype.itemsize + ID_AND_NORM_BYTES
    group = work.positions * each // machine.ranks
    return group if machine.ranks_of_node * group <= SHARE_OF_MEMORY * machine.memory_bytes else 0


def corpus_memory(work: Workload, machine: Machine) -> int:
    return 2 * _PROCESS_BYTES


def key_memory(work: Workload, machine: Machine) -> int:
    """Weights, unless a GPU holds them, and the batches that are being read, stored and written; a unit's
    files are written as its batches come."""
    weights = 0 if machine.gpus else base_bytes(work, machine)
    batch = min(work.positions, _BATCH_WINDOWS * work.block_size)
    return (
        2 * _PROCESS_BYTES + weights + _BATCHES_KEPT * batch * 4 * (work.dim + work.width + work.input_width)
    )


def base_bytes(work: Workload, machine: Machine) -> int:
    """The base's weights."""
    return machine.weight_bytes * work.parameters


def training_memory(work: Workload, machine: Machine) -> int:
    """What is trained, unless a GPU holds it; the reader's part is `reader_memory`."""
    trained = 0 if machine.gpus else trained_bytes(work, machine)
    return 2 * _PROCESS_BYTES + trained + reader_memory(work, machine)


def trained_bytes(work: Workload, machine: Machine) -> int:
    """Of a rank's state, which ZeRO-3 spreads, and of the weights of the base that it reads; the loss keeps
    chunks within a budget."""
    state = math.ceil(work.memory.num_parameters() * _TRAINING_BYTES / machine.ranks)
    if work.input_codec == "none":  # the head that is shared is the base's own tensor
        return state + base_bytes(work, machine)
    return state + machine.weight_bytes * work.memory.num_shared_parameters()


def gpu_bytes(stage: str, work: Workload, machine: Machine) -> int:
    """That a rank holds on its GPU, without a batch; index and targets take as much as there is."""
    if machine.gpus and stage == "keys":
        return base_bytes(work, machine)
    return trained_bytes(work, machine) if machine.gpus and stage == "memory" else 0


def reader_memory(work: Workload, machine: Machine) -> int:
    """Decoded targets of a rank's share of the windows, and the inputs of the batches ahead.

    Inputs of a window are read from mapped files and are not a rank's own.
    """
    window = min(work.positions, work.shuffle_window_blocks * work.block_size)
    targets = window * (_ENTRY_IN_MEMORY * work.entries_of_row + _ROW_IN_MEMORY)
    inputs = work.batch_positions * 2 * work.input_width
    return math.ceil((_WINDOWS_KEPT * targets + _BATCHES_KEPT * inputs) / machine.ranks)
