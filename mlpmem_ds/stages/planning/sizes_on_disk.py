"""Part of `plan`: bytes that each stage leaves on the disk, as the formats give them."""

from __future__ import annotations

from mlpmem_ds.formats.checkpoint import bytes_of_parameter
from mlpmem_ds.formats.corpus import token_dtype
from mlpmem_ds.formats.lists_directory import RunLayout, bytes_of_key_lists
from mlpmem_ds.stages.index.factory import index_bytes as planned_index_bytes
from mlpmem_ds.stages.keys.plan import bytes_of_position
from mlpmem_ds.stages.planning.workload import Machine, Workload

# A row of a target, measured on books (docs/LAB.md, "how faithful, how large"): 131 and 322 bytes at a
# neighbour-weight perplexity of 30.3 and 309, twice as many with the exact encoding.
_ROW_BYTES, _ROW_PERPLEXITY, _ROW_POWER = {"exact": 269.0, "compact": 131.0}, 30.3, 0.387
_ENTRY_BYTES = {"exact": 3.0, "compact": 1.7}  # of an entry of a row of few neighbours
_ROW_OVERHEAD_BYTES = 9
_ZERO_STAGE = 2  # of the training, as in the time that it is given (cost_model.py)
_WEIGHT_BYTES = 4  # of a parameter, in the published weights


def corpus_bytes(work: Workload) -> int:
    return work.positions * work.value_bytes


def key_bytes(work: Workload) -> int:
    """As `extract_keys` reports them before it starts."""
    each = bytes_of_position(
        codec=work.codec,
        dim=work.dim,
        input_codec=work.input_codec,
        input_size=work.input_width,
        value_bytes=work.value_bytes,
    )
    return work.positions * each.total


def index_bytes(work: Workload) -> int:
    return planned_index_bytes(work.factory, work.dim, work.positions, work.num_shards)


def target_bytes(work: Workload) -> int:
    """A text whose neighbours agree more has smaller rows: `--calibrate` measures it."""
    grown = _ROW_BYTES[work.encoding] * (work.neighbour_perplexity / _ROW_PERPLEXITY) ** _ROW_POWER
    largest = _ROW_OVERHEAD_BYTES + work.k * _ENTRY_BYTES[work.encoding]
    return round(work.positions * min(grown, largest))


def memory_bytes(work: Workload, machine: Machine) -> int:
    """Checkpoints and the published weights of a training run, without best weights (`--select best`): of
    those a checkpoint may hold its own."""
    weights = _WEIGHT_BYTES * work.memory.num_parameters()
    return work.keep_checkpoints * checkpoint_bytes(work, machine) + weights


def checkpoint_bytes(work: Workload, machine: Machine) -> int:
    """Of one checkpoint: so many more are on disk while it is saved, before the oldest goes."""
    each = bytes_of_parameter(machine.weight_bytes, zero_stage=_ZERO_STAGE)
    return work.memory.num_parameters() * each


def list_bytes(work: Workload) -> int:
    """Keys in the order of the lists, on disk while targets are written."""
    if work.search == "exact":
        return 0
    layout = RunLayout(
        num_lists=work.num_lists,
        vocab_size=work.vocab_size,
        dim=work.dim,
        key_dtype=work.key_dtype,
        value_dtype=token_dtype(work.vocab_size),
    )
    return bytes_of_key_lists(work.positions, layout)
