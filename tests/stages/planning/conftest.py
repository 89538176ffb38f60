"""Flags of plans, and a small finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlpmem_ds.core.world import World
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.planning import plan
from mlpmem_ds.stages.targets import write_targets

SHAPE = {"parameters": 1.5e9, "width": 1536, "vocab_size": 151_936}
CLUSTER = {
    "gpus": 32,
    "ranks": 32,
    "threads": 8,
    "memory_gb": 2000.0,
    "disk_gb": 1e5,
    "disk_gb_per_second": 50.0,
}


def bytes_of(root: Path) -> int:
    """Of all files that a stage's manifest lists."""
    return sum(entry["bytes"] for entry in json.loads((root / "manifest.json").read_text())["files"])


def config(**changes: object) -> plan.Config:
    return plan.Config(**{"positions": 10**8, "threads": 2, **SHAPE, **changes})


@pytest.fixture(scope="module")
def finished(keys_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over the session's keys: keys, index, targets."""
    root = tmp_path_factory.mktemp("plan") / "run"
    root.mkdir()
    (root / "keys").symlink_to(keys_dir)
    build_index.run(build_index.Config(keys=root / "keys", output=root / "index", num_shards=2), World())
    write_targets.run(
        write_targets.Config(
            keys=root / "keys",
            index=root / "index",
            output=root / "targets",
            k=20,
            neighbour_perplexity=9.0,
            search="ivf",
            nprobe=2,
            shard_positions=320,
        ),
        World(),
    )
    return root
