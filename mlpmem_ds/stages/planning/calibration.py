"""Part of `plan`: sizes, bytes and speed of a finished run, from its manifests, run.json and log.jsonl.

A run is a directory that holds some of `corpus`, `keys`, `index`, `targets` and `memory`, each complete.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.log import ranks_of_machine, ranks_of_stage, read_events, seconds_of_stage
from mlpmem_ds.core.manifest import CompleteStage, read_stage
from mlpmem_ds.core.run_description import flags_of_run, read_description
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.index_directory import IndexDirectory, open_index
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.formats.targets import Targets, open_targets
from mlpmem_ds.formats.trained_models import MemoryManifest
from mlpmem_ds.models.shape import read_shape
from mlpmem_ds.stages.planning.config import DEFAULTS
from mlpmem_ds.stages.planning.cost_model import STAGES, Calibration, seconds_of
from mlpmem_ds.stages.planning.sizes_on_disk import target_bytes
from mlpmem_ds.stages.planning.workload import Machine, Workload, cores_of_rank


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """The complete stages of a run's directory.

    Attributes:
        parameters: of the keys' base; None where its configuration is not on this disk.
        stages: their names, in the order of the pipeline.
    """

    root: Path
    keys: Keys
    index: IndexDirectory | None
    targets: Targets | None
    memory: CompleteStage[MemoryManifest] | None
    parameters: int | None
    stages: tuple[str, ...]


def read_run(root: Path) -> FinishedRun:
    """Open every complete stage in a run's directory.

    Raises:
        UserError: there is none, or no keys, whose manifest has the sizes.
    """
    if not root.is_dir():
        raise UserError(f"--calibrate {root} does not exist: name the directory of a finished run")
    stages = tuple(stage for stage in STAGES if (root / stage / "manifest.json").is_file())
    if "keys" not in stages:
        raise UserError(
            f"--calibrate {root} holds no complete keys directory: name the directory of a finished run"
        )
    keys = open_keys(root / "keys", flag="--calibrate")
    return FinishedRun(
        root=root,
        keys=keys,
        index=open_index(root / "index", flag="--calibrate") if "index" in stages else None,
        targets=open_targets(root / "targets", flag="--calibrate") if "targets" in stages else None,
        memory=_read_memory(root / "memory") if "memory" in stages else None,
        parameters=_parameters_of_base(keys),
        stages=stages,
    )


def _read_memory(root: Path) -> CompleteStage[MemoryManifest]:
    return read_stage(CompleteStage, MemoryManifest, root, flag="--calibrate")


def sizes_of_run(run: FinishedRun) -> dict[str, Any]:
    """Fields of a Workload that the run's manifests name; others are left out."""
    keys = run.keys.manifest
    sizes: dict[str, Any] = {
        "positions": keys.num_positions,
        "vocab_size": keys.vocab_size,
        "dim": keys.codec.dim,
        "codec": keys.codec.name,
        "width": keys.input_width // (1 + len(keys.input_earlier_layers)),
        "input_layers": 1 + len(keys.input_earlier_layers),
        "input_codec": keys.input_codec,
        "unit_positions": keys.unit_positions,
        "block_size": keys.block_size,
        "stride": keys.block_size,
    }
    if "corpus" in run.stages:
        sizes["stride"] = open_corpus(run.root / "corpus", keys.split, flag="--calibrate").stride
    if run.index is not None:
        sizes |= {"factory": run.index.factory, "num_shards": run.index.manifest.num_shards}
    if run.targets is not None:
        targets = run.targets.manifest
        sizes |= {"search": targets.search, "k": targets.k, "nprobe": targets.nprobe}
        sizes |= {"neighbour_perplexity": targets.neighbour_perplexity, "encoding": targets.encoding}
        sizes["shard_positions"] = targets.shard_positions
    if run.memory is not None:
        memory = run.memory.manifest
        sizes |= {"memory": dict(memory.memory), "epochs": _epochs_of(memory, keys.num_positions)}
        flags = flags_of_run(run.root / "memory")
        for name in ("keep_checkpoints", "batch_positions", "shuffle_window_blocks"):
            sizes[name] = flags.get(name, DEFAULTS[name])
    sizes |= {"parameters": run.parameters}
    return {name: value for name, value in sizes.items() if value is not None}


def _epochs_of(memory: MemoryManifest, positions: int) -> float | None:
    """That it was trained for, fewer than were planned where it was stopped early; None where unknown."""
    training = memory.training
    if training is None:
        return memory.provenance.epochs
    return training.steps * training.rows_per_step / positions


def calibrate(
    run: FinishedRun, work: Workload, machine: Machine, *, threads: int | None = None
) -> Calibration:
    """Measured over planned seconds of every stage that the run holds; `work` has the run's own sizes.

    A stage's ranks are those that made it, with `threads` each, else this machine's cores over those of a
    node; on a machine with GPUs each had one. Without the base's parameters a stage that runs the base has no
    factor.
    """
    factors: dict[str, float] = {}
    for stage in run.stages:
        if run.parameters is None and _runs_base(stage, work):
            continue
        root = run.root / stage
        ranks = ranks_of_stage(root) or int(read_description(root).get("world", 1))
        planned = seconds_of(stage, work, _machine_of_run(root, ranks, machine, threads))
        measured = _seconds_of_parts(root, stage, ranks)
        factors |= {part: measured[part] / planned[part] for part in planned if measured.get(part, 0) > 0}
    target_factor = 1.0
    if run.targets is not None:
        target_factor = run.targets.num_bytes / target_bytes(work)
    return Calibration(seconds=factors, target_bytes=target_factor)


def _runs_base(stage: str, work: Workload) -> bool:
    return stage == "keys" or (stage == "memory" and work.input_codec == "none")


def _machine_of_run(root: Path, ranks: int, planned: Machine, threads: int | None) -> Machine:
    """The planned machine with the ranks of a stage of a run, on as many nodes as its log says; where it does
    not, on one node, or as many a node as are planned."""
    as_planned = ranks if planned.nodes == 1 else planned.ranks_of_node
    nodes = -(-ranks // (ranks_of_machine(root, ranks) or as_planned))
    return dataclasses.replace(
        planned,
        ranks=ranks,
        cores=cores_of_rank(threads, ranks=ranks, nodes=nodes),
        gpus=ranks if planned.gpus else 0,
        nodes=nodes,
    )


def _seconds_of_parts(root: Path, stage: str, ranks: int) -> dict[str, float]:
    """Wall seconds of each part; for the index those of its units, which are logged when they end."""
    if stage != "index":
        return {stage: seconds_of_stage(root) or 0.0}
    units = {
        event["unit"]: event["seconds"]
        for event in read_events(root / "log.jsonl")
        if event["event"] == "unit" and "unit" in event and isinstance(event.get("seconds"), (int, float))
    }
    trained = units.pop("trained", 0.0)
    return {"index.train": trained, "index.fill": sum(units.values()) / max(1, min(ranks, len(units)))}


def _parameters_of_base(keys: Keys) -> int | None:
    """Of the keys' base, by its directory or the Hub's cache on this disk; None where neither has one of its
    name and width: from here a relative path may lead to another base."""
    model = flags_of_run(keys.root).get("model")
    try:
        shape = read_shape(str(model), local_files_only=True) if model else None
    except ValueError:
        return None
    return shape.parameters if shape is not None and shape.width == keys.manifest.key_size else None
