"""Readers of a manifest refuse a directory that is missing, incomplete, foreign or damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.manifest import read_manifest
from mlpmem_ds.core.world import World

from .toy_stage import Config, run


def test_a_damaged_manifest_is_the_users_error(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    run(config, World())
    path = config.output / "manifest.json"
    good = path.read_text()
    for bad in (good.replace('"files"', '"filas"'), good.replace('"sha256"', '"sha255"'), "[]", good[:50]):
        path.write_text(bad)
        with pytest.raises(DamagedDataError, match="manifest"):
            read_manifest(config.output, stage="toy", version=1, flag="--toy")


def test_readers_refuse_what_is_missing_foreign_or_damaged(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(config.output, stage="toy", version=1, flag="--toy")
    run(config, World())
    manifest, sha256 = read_manifest(config.output, stage="toy", version=1, flag="--toy")
    assert manifest["total"] == 10 and len(sha256) == 64
    with pytest.raises(UserError, match="holds mlpmem-toy, not mlpmem-keys: give the output of extract_keys"):
        read_manifest(config.output, stage="keys", version=1, flag="--keys")
    with pytest.raises(
        UserError, match="is not a directory of mlpmem corpus: give the output of prepare_corpus"
    ):
        read_manifest(tmp_path, stage="corpus", version=1, flag="--corpus")
    with pytest.raises(DamagedDataError, match="version 1, this program reads 2"):
        read_manifest(config.output, stage="toy", version=2, flag="--toy")
    (config.output / "part-4.npy").write_bytes(b"short")
    with pytest.raises(DamagedDataError, match=r"part-4\.npy has 5 bytes"):
        read_manifest(config.output, stage="toy", version=1, flag="--toy")
