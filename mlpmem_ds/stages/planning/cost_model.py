"""Part of `plan`: what each stage costs: bytes on disk, files, seconds, memory of a rank.

Bytes, files and operations are counted (counts.py). Seconds are counts over rates, times a factor from a
finished run (1 without one). The rates of a core were measured on two cores with AVX512-VNNI; those of a GPU
are assumed shares of its peak, calculated and not measured. Where a time cannot be planned there is none,
and the reason (limits.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from mlpmem_ds.maths.exact_limit import max_keys_for_exact
from mlpmem_ds.stages.index.factory import training_operations
from mlpmem_ds.stages.planning.counts import (
    body_operations,
    candidates,
    moved,
    num_files,
    operations,
    owners_of_query,
    sent_bytes,
)
from mlpmem_ds.stages.planning.limits import limit_of
from mlpmem_ds.stages.planning.rank_memory import (
    corpus_memory,
    gpu_bytes,
    index_memory,
    key_memory,
    target_memory,
    training_memory,
)
from mlpmem_ds.stages.planning.sizes_on_disk import (
    checkpoint_bytes,
    corpus_bytes,
    index_bytes,
    key_bytes,
    list_bytes,
    memory_bytes,
    target_bytes,
)
from mlpmem_ds.stages.planning.workload import Machine, Workload

_CORE_TOKENS = 2.5e5  # tokens a second of a core while a corpus is made
_CORE_FORWARD = 6e10  # float operations a second of a core in a forward pass,
_CORE_TRAINING = 1.5e11  # … and in training, whose products are larger
_CORE_INT8 = 6e11  # operations a second of a core in products of codes, with selection of the nearest list
_CORE_HASHED = 1.4e9  # bytes a second of one thread, SHA-256
_CODE_TRAINING_SECONDS = 8.0  # of a product quantizer, on one core
_SECONDS_OF_ENCODING = 5e-6  # of a key, 64 bytes
_SECONDS_OF_PAIR = 3.2e-9  # of exact search: to select among the keys, without the product
_SECONDS_OF_CANDIDATE = 2e-8  # of list search: product and selection
_SECONDS_OF_NEIGHBOUR = 1.5e-7  # sorting it, weighing it, writing it
_SECONDS_OF_ANSWER = 1e-8  # of a neighbour that another rank found, to merge it
_GPU_FORWARD, _GPU_TRAINING, _GPU_SEARCH = 0.4, 0.35, 0.2  # shares of the dense 16-bit peak
# Of a distance on a GPU: int32 tiles pass its memory about seven times, 28 bytes at 3.35e12 bytes a second.
_GPU_SECONDS_OF_PAIR = 8.4e-12
_NVLINK_RATE = 2e11  # bytes a second that a GPU sends to those of its node; assumed, half of the data sheet's


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured over planned: seconds by stage (`index` in two parts) and bytes of targets."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    target_bytes: float = 1.0

    @property
    def stages(self) -> tuple[str, ...]:
        """Those whose seconds were measured, in the order of the pipeline."""
        measured = {part.partition(".")[0] for part in self.seconds}
        return tuple(stage for stage in STAGES if stage in measured)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one stage.

    Attributes:
        bytes, num_files: that it leaves on disk.
        operations: of its matrix products, all ranks together.
        seconds: by the clock; None where they cannot be planned, and `limit` says why.
        rank_memory_bytes: the most of a rank, on the host. For index and targets its own: what they map is
            shared by the ranks of a machine, and more memory than that only saves reading.
        rank_gpu_bytes: that a rank holds on its GPU, without a batch; 0 for what takes as much as there is.
        gpu_hours: of all GPUs; None as `seconds`.
        temporary_bytes: more that is on disk while the stage runs: the lists of the targets, the checkpoint
            that a training saves before it removes an older one.
    """

    bytes: int
    num_files: int
    operations: float
    seconds: float | None
    rank_memory_bytes: int
    gpu_hours: float | None
    rank_gpu_bytes: int = 0
    temporary_bytes: int = 0
    limit: str | None = None


STAGES = ("corpus", "keys", "index", "targets", "memory")
_ON_GPU = ("keys", "index", "targets", "memory")


def costs(work: Workload, machine: Machine, calibration: Calibration | None = None) -> dict[str, Cost]:
    """The cost of every stage of a run."""
    calibration = calibration or Calibration()
    formulas: dict[str, tuple[Callable[..., int], Callable[..., int]]] = {
        "corpus": (corpus_bytes, corpus_memory),
        "keys": (key_bytes, key_memory),
        "index": (index_bytes, index_memory),
        "targets": (target_bytes, target_memory),
        "memory": (partial(memory_bytes, machine=machine), training_memory),
    }
    temporary = {"targets": list_bytes(work), "memory": checkpoint_bytes(work, machine)}
    result = {}
    for stage, (bytes_of, memory_of) in formulas.items():
        limit = limit_of(stage, work, machine)
        parts = seconds_of(stage, work, machine)
        computing = sum(value * calibration.seconds.get(part, 1.0) for part, value in parts.items())
        seconds = max(computing, bytes_moved(stage, work, machine) / machine.disk_rate)
        size = bytes_of(work) * (calibration.target_bytes if stage == "targets" else 1)
        gpus = machine.gpus if stage in _ON_GPU else 0
        result[stage] = Cost(
            bytes=round(size),
            num_files=num_files(stage, work, ranks=machine.ranks),
            operations=operations(stage, work),
            seconds=None if limit else seconds,
            rank_memory_bytes=memory_of(work, machine),
            rank_gpu_bytes=gpu_bytes(stage, work, machine),
            gpu_hours=None if limit else seconds * gpus / 3600,
            temporary_bytes=temporary.get(stage, 0),
            limit=limit,
        )
    return result


def bytes_moved(stage: str, work: Workload, machine: Machine) -> float:
    """Bytes that a stage reads from the disk and writes to it; files that fit in memory are read once."""
    total = moved(stage, work, machine)
    if stage == "memory" and total.read <= max(1.0, work.epochs) * machine.memory_bytes:
        return total.read / max(1.0, work.epochs) + total.written
    return total.read + total.written


def seconds_of(stage: str, work: Workload, machine: Machine) -> dict[str, float]:
    """Wall seconds, in the parts that the log of a finished run distinguishes."""
    formulas: dict[str, Callable[[Workload, Machine], dict[str, float]]] = {
        "corpus": lambda work, machine: {
            "corpus": work.positions / (_CORE_TOKENS * machine.ranks * machine.cores)
        },
        "keys": _seconds_of_keys,
        "index": _seconds_of_index,
        "targets": _seconds_of_targets,
        "memory": _seconds_of_training,
    }
    return formulas[stage](work, machine)


def _seconds_of_keys(work: Workload, machine: Machine) -> dict[str, float]:
    """The forward pass over windows that overlap; each rank hashes what it writes, in one thread."""
    rate = _forward_rate(machine)
    hashing = key_bytes(work) / (_CORE_HASHED * machine.ranks)
    return {"keys": max(operations("keys", work) / rate, hashing)}


def _seconds_of_training(work: Workload, machine: Machine) -> dict[str, float]:
    """The memory's steps, and where keys store no inputs the base's forward pass, again in each epoch."""
    rate = (
        _GPU_TRAINING * machine.gpus * machine.gpu_flops
        if machine.gpus
        else _CORE_TRAINING * machine.ranks * machine.cores
    )
    online = work.epochs * body_operations(work) if work.input_codec == "none" else 0.0
    trained = (operations("memory", work) - online) / rate
    return {"memory": trained + online / _forward_rate(machine) + seconds_of_sending(work, machine, trained)}


def seconds_of_sending(work: Workload, machine: Machine, trained: float = 0.0) -> float:
    """Gradients and weights between GPUs, that the backward (two thirds of `trained`) does not hide.

    ZeRO 2 with one micro-batch a step sends 4 P bytes of gradients while the backward runs, and then 2 P of
    weights (ds_configs/README.md, counted). On CPUs it is within the measured rate.
    """
    if machine.gpus < 2:
        return 0.0
    rate = machine.gpu_network_rate if machine.nodes > 1 else _NVLINK_RATE
    steps = work.epochs * work.positions / work.batch_positions
    each = steps * work.memory.num_parameters() / rate
    return 2 * each + max(0.0, 4 * each - trained * 2 / 3)


def _forward_rate(machine: Machine) -> float:
    """Operations a second of all ranks."""
    if machine.gpus:
        return _GPU_FORWARD * machine.gpus * machine.gpu_flops
    return _CORE_FORWARD * machine.ranks * machine.cores


def _seconds_of_index(work: Workload, machine: Machine) -> dict[str, float]:
    """All ranks train the lists together, one the code; the shards are dealt. Codes are made on the CPU."""
    trained = training_operations(work.index, work.positions, work.dim)
    placed = 2.0 * work.positions * work.num_lists * work.dim
    busy = min(machine.ranks, work.num_shards)
    hashing = work.stored_key_bytes / _CORE_HASHED
    encoding = work.positions * _SECONDS_OF_ENCODING / (busy * machine.cores)
    if machine.gpus:
        gpus = min(busy, machine.gpus)
        training = _comparing(trained, work, machine, machine.gpus)
        placing = _comparing(placed, work, machine, gpus)
    else:
        training = trained / _CORE_INT8 / (machine.ranks * machine.cores)
        placing = placed / _CORE_INT8 / (busy * machine.cores)
    codes = _CODE_TRAINING_SECONDS / machine.cores
    return {"index.train": training + codes, "index.fill": placing + encoding + hashing / busy}


def _comparing(count: float, work: Workload, machine: Machine, gpus: int) -> float:
    """Seconds of so many operations of distances on some GPUs: by the products, or by the tiles' memory."""
    products = count / (_GPU_SEARCH * machine.gpu_flops)
    tiles = count / (2.0 * work.dim) * _GPU_SECONDS_OF_PAIR
    return max(products, tiles) / gpus


def _seconds_of_targets(work: Workload, machine: Machine) -> dict[str, float]:
    """Lists are found, keys compared by the ranks that own them, answers merged, rows made; the latter two on
    the CPU."""
    cores = machine.ranks * machine.cores
    rows = work.positions * work.k * _SECONDS_OF_NEIGHBOUR / cores
    if sent := sent_bytes(work, machine.ranks):
        answers = owners_of_query(work, machine.ranks) * work.positions * work.k
        rows += answers * _SECONDS_OF_ANSWER / cores + sent / machine.network_rate
    hashing = moved("targets", work, machine).hashed / (_CORE_HASHED * machine.ranks)
    if machine.gpus:
        return {
            "targets": _comparing(operations("targets", work), work, machine, machine.gpus) + rows + hashing
        }
    if work.search == "exact":
        pairs = work.positions * (work.positions * (1e-12 * work.dim + _SECONDS_OF_PAIR))
    else:
        found = 2.0 * work.num_lists * work.dim / _CORE_INT8
        compared = candidates(work) * _SECONDS_OF_CANDIDATE * work.dim / 256
        pairs = work.positions * (found + compared)
    return {"targets": pairs / cores + rows + hashing}


def resolve_search(search: str, positions: int, key_bytes: int, machine: Machine) -> str:
    """The search that `auto` chooses: exact up to as many keys as the device compares quickly."""
    if search != "auto":
        return search
    most = max_keys_for_exact("cuda" if machine.gpus else "cpu", key_bytes, int(machine.gpu_bytes))
    return "exact" if positions <= most else "ivf"
