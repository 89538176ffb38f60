"""The toy targets in both encodings and containers, written once a worker."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlpmem_ds.formats.target_encoding import Encoding
from mlpmem_ds.formats.target_shards import Container, shard_name

from .toy_targets import SHARD_POSITIONS, write_targets


@pytest.fixture(
    scope="session", params=[(e, c) for e in ("exact", "compact") for c in ("tar.zst", "tar")], ids="-".join
)
def target_kind(request: pytest.FixtureRequest) -> tuple[Encoding, Container]:
    return request.param


@pytest.fixture(scope="session")
def targets_dir(target_kind: tuple[Encoding, Container], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_targets(tmp_path_factory.mktemp("targets") / "targets", *target_kind)


@pytest.fixture
def targets_copy(targets_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(targets_dir, tmp_path / "copy"))


@pytest.fixture(scope="session")
def first_shard(target_kind: tuple[Encoding, Container]) -> str:
    return shard_name(0, SHARD_POSITIONS, target_kind[1])
