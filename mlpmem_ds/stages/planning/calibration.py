"""Part of `plan`: sizes, bytes and speed of a finished run, from its manifests, run.json and log.jsonl.

A run is a directory that holds some of `corpus`, `keys`, `index`, `targets` and `memory`, each complete.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import read_json
from mlpmem_ds.core.log import read_events, seconds_of_stage
from mlpmem_ds.formats.index_directory import open_index
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.models.shape import read_shape
from mlpmem_ds.stages.planning.cost_model import (
    STAGES,
    Calibration,
    Machine,
    Workload,
    seconds_of,
    target_bytes,
)


def read_run(root: Path) -> dict[str, dict[str, Any]]:
    """Manifest of every complete stage in a run's directory, by name.

    Raises:
        UserError: there is none, or no keys, whose manifest has the sizes.
    """
    if not root.is_dir():
        raise UserError(f"--calibrate {root} does not exist: name the directory of a finished run")
    found = {
        stage: read_json(root / stage / "manifest.json")
        for stage in STAGES
        if (root / stage / "manifest.json").is_file()
    }
    if "keys" not in found:
        raise UserError(
            f"--calibrate {root} holds no complete keys directory: name the directory of a finished run"
        )
    _ = open_keys(root / "keys", flag="--calibrate")
    if "index" in found:
        _ = open_index(root / "index", flag="--calibrate")
    if "targets" in found:
        _ = open_targets(root / "targets", flag="--calibrate")
    return found


def sizes_of_run(root: Path, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Fields of a Workload that the run's manifests name; others are left out."""
    keys_of = found["keys"]
    sizes: dict[str, Any] = {
        "positions": keys_of["num_positions"],
        "vocab_size": keys_of["vocab_size"],
        "dim": keys_of["codec"]["dim"],
        "codec": keys_of["codec"]["name"],
        "width": keys_of.get("input_width") or keys_of["input_size"] or keys_of["key_size"],
        "input_codec": keys_of.get("input_codec") or ("bf16" if keys_of["input_size"] else "none"),
    }
    if "index" in found:
        sizes |= {"factory": found["index"]["factory"], "num_shards": found["index"]["num_shards"]}
    if "targets" in found:
        target = found["targets"]
        sizes |= {name: target[name] for name in ("search", "k", "neighbour_perplexity")}
        sizes |= {"nprobe": target["config"].get("nprobe"), "encoding": target.get("encoding", "exact")}
    if "memory" in found:
        sizes |= {"memory": found["memory"]["memory"], "epochs": found["memory"]["config"]["epochs"]}
        sizes |= {"keep_checkpoints": _run(root / "memory")["config"].get("keep_checkpoints", 2)}
    sizes |= {"parameters": _parameters_of_base(root)}
    return {name: value for name, value in sizes.items() if value is not None}


def calibrate(root: Path, found: dict[str, dict[str, Any]], work: Workload, machine: Machine) -> Calibration:
    """Measured over planned seconds of every stage that the run holds; `work` has the run's own sizes.

    The run's ranks are those of its latest start; cores of a rank and GPUs are taken to be this machine's.
    """
    factors: dict[str, float] = {}
    for stage in found:
        ranks = int(_run(root / stage).get("world", 1))
        planned = seconds_of(stage, work, dataclasses.replace(machine, ranks=ranks))
        measured = _seconds_of_parts(root / stage, stage, ranks)
        factors |= {part: measured[part] / planned[part] for part in planned if measured.get(part, 0) > 0}
    target_factor = 1.0
    if "targets" in found:
        size = sum(entry["bytes"] for entry in found["targets"]["files"])
        target_factor = size / target_bytes(work)
    return Calibration(seconds=factors, target_bytes=target_factor)


def _seconds_of_parts(root: Path, stage: str, ranks: int) -> dict[str, float]:
    """Wall seconds of each part; for the index those of its units, which are logged when they end."""
    if stage != "index":
        return {stage: seconds_of_stage(root) or 0.0}
    units = {
        event["unit"]: event["seconds"]
        for event in read_events(root / "log.jsonl")
        if event["event"] == "unit"
    }
    trained = units.pop("trained", 0.0)
    return {"index.train": trained, "index.fill": sum(units.values()) / max(1, min(ranks, len(units)))}


def _run(root: Path) -> dict[str, Any]:
    return read_json(root / "run.json") if (root / "run.json").is_file() else {"config": {}}


def _parameters_of_base(root: Path) -> int | None:
    """Parameters of the base of the keys; None if it is no longer on this disk."""
    model = _run(root / "keys")["config"].get("model")
    if not model or not Path(model).is_dir():
        return None
    try:
        return read_shape(model).parameters
    except ValueError:
        return None
