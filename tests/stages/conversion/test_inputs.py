"""What an export is made from is asked for no more than the export needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.target_shards import TargetShard
from mlpmem_ds.stages.conversion.config import Config
from mlpmem_ds.stages.conversion.inputs import open_inputs

from ...manifests import targets_manifest
from .conftest import MemoryFlags, save_memory


def test_of_the_targets_the_manifest_is_enough(flags: MemoryFlags, base_dir: Path, tmp_path: Path) -> None:
    """Their shards may be elsewhere, or removed after the training to have their room."""
    own = replace(flags, targets=tmp_path / "targets")
    stage = open_stage(own.targets, stage="targets", version=1, config=own, inputs={}, world=World())
    shard = TargetShard(name="targets-000000.tar.zst", first=0, count=8, entries=0, samples=1)

    def write(unit: str, writer: UnitWriter) -> Mapping[str, Any]:
        with writer.file(shard.name) as path:
            path.write_bytes(b"rows")
        return {}

    stage.run_units(["shard"], write)
    stage.complete(["shard"], lambda: targets_manifest(num_positions=8, k=48, shards=(shard,)))
    memory = save_memory(tmp_path / "memory", own)
    (own.targets / shard.name).unlink()
    inputs = open_inputs(
        Config(checkpoint=(memory,), model=str(base_dir), output=tmp_path / "export", lmbda=0.3)
    )
    assert inputs.targets is not None and inputs.targets.k == 48
