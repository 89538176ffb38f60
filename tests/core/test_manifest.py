"""Readers of a manifest refuse a directory that is missing, incomplete, foreign or damaged."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.scale.counted_calls import counted_calls
from mlpmem_ds.core import file_lists
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.file_lists import files_of, list_files
from mlpmem_ds.core.files import FileRecord, publish_json, read_json
from mlpmem_ds.core.manifest import CompleteStage, is_own_directory, read_stage
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import open_keys

from .toy_stage import UNITS, Config, ToyManifest, read_toy, run


class NextManifest(ToyManifest):
    VERSION = 2


def test_a_damaged_manifest_is_the_users_error(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    run(config, World())
    path = config.output / "manifest.json"
    good = path.read_text()
    for bad in (good.replace('"files"', '"filas"'), good.replace('"sha256"', '"sha255"'), "[]", good[:50]):
        path.write_text(bad)
        with pytest.raises(DamagedDataError, match="manifest"):
            read_toy(config.output)


def test_readers_refuse_what_is_missing_foreign_or_damaged(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    with pytest.raises(UserError, match="does not exist"):
        read_toy(config.output)
    run(config, World())
    stage = read_toy(config.output)
    assert stage.manifest.total == 10 and len(stage.sha256) == 64
    with pytest.raises(UserError, match="holds mlpmem-toy, not mlpmem-keys: give the output of extract_keys"):
        open_keys(config.output)
    with pytest.raises(
        UserError, match="is not a directory of mlpmem corpus: give the output of prepare_corpus"
    ):
        open_corpus(tmp_path, "train")
    with pytest.raises(DamagedDataError, match="version 1, this program reads 2"):
        read_stage(CompleteStage, NextManifest, config.output, flag="--toy")
    (config.output / "part-4.npy").write_bytes(b"short")
    with pytest.raises(DamagedDataError, match=r"part-4\.npy has 5 bytes"):
        read_toy(config.output)


def test_a_file_is_compared_in_size_when_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large directory only some are when it is opened."""
    config = Config(output=tmp_path / "toy")
    run(config, World())
    monkeypatch.setattr(file_lists, "_MAX_CHECKED", 1)
    (config.output / "part-4.npy").unlink()
    stage = read_toy(config.output)
    assert stage.path_of("part-1.npy") == config.output / "part-1.npy"
    with pytest.raises(DamagedDataError, match=r"part-4\.npy is missing: run the stage .* again"):
        stage.path_of("part-4.npy")
    with pytest.raises(DamagedDataError, match=r"does not record part-5\.npy"):
        stage.path_of("part-5.npy")


def test_a_start_asks_for_as_many_files_however_many_there_are(tmp_path: Path) -> None:
    """Sparse files of 61,000 units: the manifest and some of its lists are read, some sizes compared."""
    names = [f"{kind}/{unit // 1000:04d}/{kind}-{unit:06d}" for unit in range(12_200) for kind in "abcde"]
    records = [FileRecord(name=name, bytes=0, sha256=sha256(b"").hexdigest()) for name in names]
    (tmp_path / "identity.json").write_text("{}")
    manifest = {"format": "mlpmem-toy", "version": 1, "inputs": {}, "config": {}, "total": 0}
    publish_json(tmp_path / "manifest.json", manifest | list_files(tmp_path, records), seal=True)
    for record in files_of(read_json(tmp_path / "manifest.json"), tmp_path).sample():
        (tmp_path / record.name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / record.name).touch()
    with counted_calls(tmp_path) as calls:
        stage = read_toy(tmp_path)
    assert len(stage.files) == 61_000
    assert calls["opens"] + calls["stats"] < 150


def test_each_record_is_read_once_when_the_manifest_is_written(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "toy")
    directory = open_stage(config.output, stage="toy", version=1, config=config, inputs={}, world=World())
    directory.run_units(UNITS, lambda unit, writer: {"sum": int(unit)})
    with counted_calls(config.output / "done") as calls:
        directory.complete(UNITS, lambda: {"total": sum(each["sum"] for each in directory.summaries(UNITS))})
    assert calls["opens"] == len(UNITS)


def test_an_output_of_ours_is_known_by_its_format_also_where_its_seal_is_broken(tmp_path: Path) -> None:
    for content, is_ours in (
        ('{"format": "mlpmem-corpus"}', True),
        ('{"format": "mlpmem-corpus", "content_sha256": "0"}', True),
        ('{"format": "other"}', False),
        ('{"format": 3}', False),
        ("[1]", False),
        ("no JSON", False),
        ("[" * 100_000, False),
    ):
        (tmp_path / "identity.json").write_text(content)
        assert is_own_directory(tmp_path, "identity.json") == is_ours
    assert not is_own_directory(tmp_path, "manifest.json")
