"""A stage of five units that the tests of a stage's directory run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.manifest import CompleteStage, Manifest, read_stage
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World

UNITS = [f"{number}" for number in range(5)]


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    output: Path = option("directory")
    factor: int = option("factor", 2)
    threads: int = option("threads", 1, identity="none")


@dataclass(frozen=True, kw_only=True)
class ToyManifest(Manifest):
    FORMAT: ClassVar[str] = "toy"
    VERSION: ClassVar[int] = 1

    total: int


def run(
    config: Config, world: World, *, fail_at: str | None = None, input_hash: str = "i", take_over: bool = True
) -> list[str]:
    """A stage of five units; returns those computed by this call."""
    directory = open_stage(
        config.output, stage="toy", version=1, config=config, inputs={"corpus": input_hash}, world=world
    )
    computed: list[str] = []

    def compute(unit: str, writer: UnitWriter) -> Mapping[str, Any]:
        writer.array(f"part-{unit}.npy", np.arange(4) * int(unit) * config.factor)
        if unit == fail_at:
            raise RuntimeError("killed")
        computed.append(unit)
        return {"sum": int(unit)}

    directory.run_units(UNITS, compute, take_over=take_over)
    directory.complete(
        UNITS, lambda: {"total": sum(summary["sum"] for summary in directory.summaries(UNITS))}
    )
    return computed


def read_toy(root: Path) -> CompleteStage[ToyManifest]:
    stage: CompleteStage[ToyManifest] = read_stage(CompleteStage, ToyManifest, root, flag="--toy")
    return stage


def result_of(root: Path) -> dict[str, str]:
    """Name → hash of all that belongs to the result."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "log.jsonl")
    }
