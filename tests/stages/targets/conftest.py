"""Small keys with ties, their index, and targets of an undisturbed run, made once a worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core.world import World
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.targets import write_targets

NUM_KEYS, DIM, VOCAB_SIZE, SCALE = 403, 6, 40, 0.5


NUM_LISTS = 7


def result_of(root: Path, *, without_lists: bool = False) -> dict[str, bytes]:
    """Every file of the result; `without_lists`: but for keys in list order, which a killed run may leave to
    the next."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and path.name not in ("run.json", "log.jsonl")
        and not path.name.endswith((".tmp", ".claim"))
        and not (without_lists and path.relative_to(root).parts[0] in ("lists", ".lists.removed"))
    }


def vectors() -> np.ndarray:
    """Small numbers, so that distances tie; some keys are there twice."""
    codes = np.random.default_rng(0).integers(-6, 7, size=(NUM_KEYS, DIM)).astype(np.int8)
    codes[200:230] = codes[:30]
    return codes


def values() -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB_SIZE, NUM_KEYS)


@pytest.fixture(scope="session")
def keys(make_keys: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("keys") / "keys"
    return make_keys(
        root, vectors(), values(), vocab_size=VOCAB_SIZE, scale=SCALE, unit_positions=96, block_size=8
    )


@pytest.fixture(scope="session")
def index(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("index") / "index"
    build_index.run(
        build_index.Config(keys=keys, output=root, factory=f"IVF{NUM_LISTS},PQ3x4", num_shards=2), World()
    )
    return root


def config(keys_dir: Path, output_dir: Path, **changes: Any) -> write_targets.Config:
    settings = {
        "keys": keys_dir,
        "output": output_dir,
        "k": 20,
        "temperature": "6",
        "mass": 0.9,
        "shard_positions": 104,
        "encoding": "exact",
    }
    return write_targets.Config(**{**settings, **changes})


@pytest.fixture(scope="session")
def undisturbed(keys: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("targets") / "targets"
    write_targets.run(config(keys, root, index=index, search="ivf", nprobe=3), World())
    return root


@pytest.fixture(scope="session")
def compact(keys: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compact encoding, plain tar, fitted temperature."""
    root = tmp_path_factory.mktemp("compact") / "targets"
    write_targets.run(config(keys, root, **COMPACT, index=index), World())
    return root


COMPACT: dict[str, Any] = {
    "encoding": "compact",
    "container": "tar",
    "temperature": "auto",
    "neighbour_perplexity": 8.0,
    "search": "ivf",
    "nprobe": 3,
}
