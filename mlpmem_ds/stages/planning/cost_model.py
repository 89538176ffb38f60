"""Part of `plan`: what each stage costs, from the sizes of a run: bytes on disk, seconds, memory of a rank.

Bytes follow from the formats. Seconds are operations over rates, times a factor from a finished run (1
without one). The rates of a core were measured on two cores with AVX512-VNNI; those of a GPU are assumed
shares of its peak, not measured. Memory of index and targets is a rank's own, without the files that it maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.formats.corpus import token_dtype
from mlpmem_ds.formats.lists_directory import RUN_POSITIONS, RunLayout, bytes_of_key_lists
from mlpmem_ds.maths.exact_limit import max_keys_for_exact
from mlpmem_ds.maths.knn import KEY_BLOCK, QUERY_BLOCK
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.index.factory import index_bytes as planned_index_bytes
from mlpmem_ds.stages.index.factory import make_index, training_operations
from mlpmem_ds.stages.keys.plan import bytes_of_position

_CORE_TOKENS = 2.5e5  # tokens a second of a core while a corpus is made
_CORE_FORWARD = 6e10  # float operations a second of a core in a forward pass,
_CORE_TRAINING = 1.5e11  # … and in training, whose products are larger
_CORE_INT8 = (
    6e11  # operations a second of a core in products of codes, selection of the nearest list included
)
_CODE_TRAINING_SECONDS = 8.0  # of a product quantizer, on one core
_SECONDS_OF_ENCODING = 5e-6  # of a key, 64 bytes
_SECONDS_OF_PAIR = 3.2e-9  # of exact search: to select among the keys, without the product
_SECONDS_OF_CANDIDATE = 2e-8  # of list search: product and selection
_SECONDS_OF_NEIGHBOUR = 1.5e-7  # sorting it, weighing it, writing it
_LIST_IMBALANCE = 1.3  # keys met in the lists that a query probes, over keys of as many average lists
_GPU_FORWARD, _GPU_TRAINING, _GPU_SEARCH = 0.4, 0.35, 0.2  # shares of the dense 16-bit peak
_PROCESS_BYTES = 300_000_000  # Python with torch, NumPy and faiss imported, with the libraries' files
_PRIVATE_PROCESS_BYTES = 157_000_000  # … and without them
_CANDIDATE_BYTES = 4 * 2**24  # the buffer of list search, of a worker
_BATCH_POSITIONS = 16384
_MAX_WORKERS = 8  # threads of write_targets that share a batch
_ROW_BYTES = 80_000_000  # rows being weighed and written, of a worker
# Of a worker, in addition to its candidates: assigned lists, copies of queries and ids, the selection.
_LIST_SEARCH_BYTES = 150_000_000
_GATHERED_BYTES = 2**28  # keys of the sample's lists, before the keys lie list by list
_SAMPLE = 1000  # positions that are measured first
_CODE_SAMPLE = 1 << 16  # vectors that are float32 at once while codes are trained
_CHECKPOINT_BYTES = 12  # of a parameter: Adam's moments and the master weights
_WEIGHT_BYTES = 4  # of a parameter, in the published weights
_TRAINING_BYTES = 18  # of a parameter, over the ranks with ZeRO-3: weights, gradients, the optimizer's state

Encoding = Literal["exact", "compact"]
_ENTRY_BYTES = {"exact": 3.0, "compact": 1.7}  # of an entry of a row, compressed
_ROW_OVERHEAD_BYTES = 9


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes of a run."""

    positions: int
    vocab_size: int
    parameters: int
    width: int
    dim: int
    codec: str
    input_codec: str
    factory: str
    num_shards: int
    search: str
    nprobe: int
    k: int
    neighbour_perplexity: float
    encoding: Encoding
    memory: MemoryConfig
    epochs: float
    keep_checkpoints: int

    @property
    def index(self) -> Index:
        """An empty one of the factory."""
        return make_index(self.factory, self.dim, self.positions)

    @property
    def num_lists(self) -> int:
        return self.index.num_lists


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of a run; with 0 `gpus` it computes on the CPU.

    Attributes:
        gpu_flops: dense 16-bit peak of one GPU, operations a second.
        disk_rate: bytes a second, of all ranks together.
    """

    ranks: int
    cores: int
    gpus: int
    gpu_flops: float
    memory_bytes: int
    disk_bytes: int
    disk_rate: float = 1e9


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured over planned: seconds by stage (`index` in two parts) and bytes of targets."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    target_bytes: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one stage: bytes it leaves on disk, wall seconds, peak bytes of a rank, GPU hours.

    The memory of index and targets is a rank's own; what they map is shared by the ranks of a machine, and
    more memory than that only saves reading. `temporary_bytes` are on disk while the stage runs.
    """

    bytes: int
    seconds: float
    rank_memory_bytes: int
    gpu_hours: float
    temporary_bytes: int = 0


STAGES = ("corpus", "keys", "index", "targets", "memory")


def costs(work: Workload, machine: Machine, calibration: Calibration | None = None) -> dict[str, Cost]:
    """The cost of every stage of a run."""
    calibration = calibration or Calibration()
    formulas: dict[str, tuple[Callable[..., int], Callable[..., int]]] = {
        "corpus": (corpus_bytes, _corpus_memory),
        "keys": (key_bytes, _key_memory),
        "index": (index_bytes, index_memory),
        "targets": (target_bytes, target_memory),
        "memory": (memory_bytes, _training_memory),
    }
    result = {}
    for stage, (bytes_of, memory_of) in formulas.items():
        parts = seconds_of(stage, work, machine)
        computing = sum(value * calibration.seconds.get(part, 1.0) for part, value in parts.items())
        seconds = max(computing, bytes_moved(stage, work, machine) / machine.disk_rate)
        size = bytes_of(work) * (calibration.target_bytes if stage == "targets" else 1)
        uses_gpu = stage in ("keys", "targets", "memory") and machine.gpus > 0
        result[stage] = Cost(
            bytes=round(size),
            seconds=seconds,
            rank_memory_bytes=memory_of(work, machine),
            gpu_hours=seconds * machine.gpus / 3600 if uses_gpu else 0.0,
            temporary_bytes=list_bytes(work) if stage == "targets" else 0,
        )
    return result


def corpus_bytes(work: Workload) -> int:
    return work.positions * token_dtype(work.vocab_size).itemsize


def key_bytes(work: Workload) -> int:
    """As `extract_keys` reports them before it starts."""
    each = bytes_of_position(
        codec=work.codec,
        dim=work.dim,
        input_codec=work.input_codec,
        input_size=work.width,
        value_bytes=token_dtype(work.vocab_size).itemsize,
    )
    return work.positions * each.total


def index_bytes(work: Workload) -> int:
    return planned_index_bytes(work.factory, work.dim, work.positions, work.num_shards)


def target_bytes(work: Workload) -> int:
    """Entries of a row grow as the neighbour-weight perplexity to the power .84 (44 at 30, 303 at 300), up to
    k."""
    entries = min(work.k, 303 * (work.neighbour_perplexity / 300) ** 0.84)
    return round(work.positions * (_ROW_OVERHEAD_BYTES + entries * _ENTRY_BYTES[work.encoding]))


def memory_bytes(work: Workload) -> int:
    """Checkpoints and the published weights of a training run."""
    return work.memory.num_parameters() * (_CHECKPOINT_BYTES * work.keep_checkpoints + _WEIGHT_BYTES)


def bytes_moved(stage: str, work: Workload, machine: Machine) -> float:
    """Bytes that a stage reads from the disk and writes to it; files that fit in memory are read once."""
    stored_keys = work.positions * work.dim * (1 if work.codec == "int8" else 2)
    if stage == "corpus":
        return corpus_bytes(work)
    if stage == "keys":
        return key_bytes(work)
    if stage == "index":
        return stored_keys + index_bytes(work)
    if stage == "targets":
        return stored_keys + 2 * list_bytes(work) + target_bytes(work)
    read = key_bytes(work) - stored_keys + target_bytes(work)
    return read * (max(1.0, work.epochs) if read > machine.memory_bytes else 1.0) + memory_bytes(work)


def seconds_of(stage: str, work: Workload, machine: Machine) -> dict[str, float]:
    """Wall seconds, in the parts that the log of a finished run distinguishes."""
    positions, cores = work.positions, machine.ranks * machine.cores
    on_gpu = machine.gpus > 0
    gpu_flops = machine.gpus * machine.gpu_flops
    if stage == "corpus":
        return {stage: positions / (_CORE_TOKENS * cores)}
    if stage == "keys":
        rate = _GPU_FORWARD * gpu_flops if on_gpu else _CORE_FORWARD * cores
        return {stage: 2.0 * work.parameters * positions / rate}
    if stage == "memory":
        rate = _GPU_TRAINING * gpu_flops if on_gpu else _CORE_TRAINING * cores
        return {stage: 6.0 * work.memory.num_matrix_parameters() * positions * work.epochs / rate}
    if stage == "index":
        trained = training_operations(work.index, positions, work.dim)
        placed = 2.0 * positions * work.num_lists * work.dim / _CORE_INT8 + positions * _SECONDS_OF_ENCODING
        busy = min(machine.ranks, work.num_shards) * machine.cores  # one rank trains, the shards are dealt
        return {
            "index.train": (trained / _CORE_INT8 + _CODE_TRAINING_SECONDS) / machine.cores,
            "index.fill": placed / busy,
        }
    candidates: float = positions
    if work.search == "ivf":
        candidates = min(positions, _LIST_IMBALANCE * work.nprobe * positions / work.num_lists)
    if on_gpu:
        compared = 2.0 * positions * candidates * work.dim / (_GPU_SEARCH * gpu_flops)
        # Rows are made on the CPU.
        return {stage: compared + positions * work.k * _SECONDS_OF_NEIGHBOUR / cores}
    pair = (
        _SECONDS_OF_CANDIDATE * work.dim / 256
        if work.search == "ivf"
        else 1e-12 * work.dim + _SECONDS_OF_PAIR
    )
    return {stage: positions * (candidates * pair + work.k * _SECONDS_OF_NEIGHBOUR) / cores}


def resolve_search(search: str, positions: int, machine: Machine) -> str:
    """The search that `auto` chooses: exact up to as many keys as the device compares quickly."""
    if search != "auto":
        return search
    return "exact" if positions <= max_keys_for_exact("cuda" if machine.gpus else "cpu") else "ivf"


def index_memory(work: Workload, machine: Machine) -> int:
    """Bytes of the rank that trains: the sample, a part of it as float32; then a shard. Keys are mapped."""
    key = work.dim * (1 if work.codec == "int8" else 2)
    sample = min(work.positions, work.index.num_training_vectors)
    floats = min(sample, max(_CODE_SAMPLE, work.num_lists)) * work.dim * 4
    shard = index_bytes(work) // work.num_shards
    return _PRIVATE_PROCESS_BYTES + max(sample * key + 2 * floats, 3 * shard // 2)


def target_memory(work: Workload, machine: Machine) -> int:
    """Bytes of a rank, keys mapped: the batch's neighbours, which its workers share, and what each compares.

    With lists also the sample that is searched first and the run of keys that is being put in order.
    """
    key = work.dim * (1 if work.codec == "int8" else 2)
    batch = min(_BATCH_POSITIONS, work.positions)
    workers = min(machine.cores, _MAX_WORKERS)
    neighbours = 8 * batch * work.k
    if work.search == "exact":
        comparing = 13 * QUERY_BLOCK * KEY_BLOCK + 8 * QUERY_BLOCK * (work.k + KEY_BLOCK)
        values = token_dtype(work.vocab_size).itemsize * work.positions
        return _PRIVATE_PROCESS_BYTES + values + workers * (comparing + _ROW_BYTES) + neighbours
    list_size = work.positions / work.num_lists
    candidates = 4 * round(batch * _LIST_IMBALANCE * work.nprobe * list_size)
    probes = min(candidates, workers * _CANDIDATE_BYTES) / 4 / list_size
    # Of the lists that a block probes, and their copy in one array.
    ids = workers * 16 * min(work.positions, _CANDIDATE_BYTES // 4)
    searching = (
        min(candidates, workers * _CANDIDATE_BYTES) + round(probes * key) + ids + workers * _LIST_SEARCH_BYTES
    )
    sampling = min(_GATHERED_BYTES, work.positions * key) + min(
        candidates * _SAMPLE // batch, _CANDIDATE_BYTES
    )
    ordering = 28 * min(work.positions, RUN_POSITIONS)
    return _PRIVATE_PROCESS_BYTES + max(neighbours + searching, sampling + 8 * _SAMPLE * work.k * 6, ordering)


def list_bytes(work: Workload) -> int:
    """Keys in the order of the lists, on disk while targets are written."""
    if work.search == "exact":
        return 0
    layout = RunLayout(
        num_lists=work.num_lists,
        vocab_size=work.vocab_size,
        dim=work.dim,
        key_dtype=np.dtype(np.int8 if work.codec == "int8" else np.float16),
        value_dtype=token_dtype(work.vocab_size),
    )
    return bytes_of_key_lists(work.positions, layout)


def _corpus_memory(work: Workload, machine: Machine) -> int:
    return 2 * _PROCESS_BYTES


def _key_memory(work: Workload, machine: Machine) -> int:
    """Weights, float32 on a CPU and bfloat16 on a GPU (where they are the GPU's), and a unit of keys and
    inputs."""
    weights = work.parameters * (2 if machine.gpus else 4)
    return 2 * _PROCESS_BYTES + weights + 65536 * 4 * (work.dim + work.width)


def _training_memory(work: Workload, machine: Machine) -> int:
    """ZeRO-3 spreads the state; the loss keeps chunks within a budget."""
    return 2 * _PROCESS_BYTES + math.ceil(work.memory.num_parameters() * _TRAINING_BYTES / machine.ranks)
