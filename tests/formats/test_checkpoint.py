"""Checkpoints on disk: published whole, verified, kept and removed."""

import shutil

import pytest

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import read_json
from mlpmem_ds.formats.checkpoint import (
    checkpoint_name,
    fault_of_checkpoint,
    list_checkpoints,
    publish_checkpoint,
    read_checkpoint,
    record_and_flush,
    remove_old_checkpoints,
    remove_unfinished,
    set_aside,
)

from ..manifests import checkpoint_manifest


def publish(root, step):
    directory = root / f"{checkpoint_name(step)}.tmp"
    (directory / "inner").mkdir(parents=True)
    names = ["b.pt", "inner/a.pt"]
    for name in names:
        (directory / name).write_bytes(bytes([step]) * 100)
    files = tuple(record_and_flush(directory, names))
    return publish_checkpoint(root, checkpoint_manifest(step=step, world=2, zero_stage=3, files=files))


def test_a_published_checkpoint_verifies_and_is_the_latest(tmp_path):
    root = tmp_path / "checkpoints"
    path = publish(root, 7)
    assert path == root / "step-00000007" and not list(root.glob("*.tmp"))
    assert fault_of_checkpoint(path) is None
    checkpoint = read_checkpoint(path)
    assert (checkpoint.step, checkpoint.manifest.world) == (7, 2)
    assert [record.name for record in checkpoint.manifest.files] == ["b.pt", "inner/a.pt"]
    assert read_json(tmp_path / "latest.json") == {"step": 7}


def test_each_rank_sees_the_faults_of_its_share(tmp_path):
    path = publish(tmp_path / "checkpoints", 1)
    content = bytearray((path / "inner" / "a.pt").read_bytes())
    content[50] ^= 1
    (path / "inner" / "a.pt").write_bytes(content)
    assert "checksum" in fault_of_checkpoint(path)
    assert fault_of_checkpoint(path, rank=0, size=2) is None
    assert "inner/a.pt" in fault_of_checkpoint(path, rank=1, size=2)


@pytest.mark.parametrize("manifest", [None, "{", "{}", '{"format": "mlpmem-checkpoint", "version": 2}', "[]"])
def test_a_damaged_manifest_is_a_fault(tmp_path, manifest):
    path = publish(tmp_path / "checkpoints", 1)
    if manifest is None:
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text(manifest)
    assert fault_of_checkpoint(path) is not None
    with pytest.raises(DamagedDataError):
        read_checkpoint(path)


def test_the_oldest_go_and_the_same_step_is_replaced(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (1, 2, 10, 10):
        publish(root, step)
    (root / "step-00000011.tmp").mkdir()
    remove_old_checkpoints(root, 2)
    (root / "step-00000010").rename(root / ".step-00000010.former")  # killed while it was replaced
    remove_unfinished(root)
    assert [path.name for path in list_checkpoints(root)] == ["step-00000010", "step-00000002"]
    aside = set_aside(root / "step-00000010")
    assert aside.name == "step-00000010.damaged" and len(list_checkpoints(root)) == 1
    assert len(list(root.iterdir())) == 2


def test_a_checkpoint_that_is_being_removed_has_no_manifest(tmp_path, monkeypatch):
    """It would name files that are gone: whoever sends checkpoints would take it for a damaged one."""
    path = publish(tmp_path / "checkpoints", 1)
    manifests = []
    monkeypatch.setattr(shutil, "rmtree", lambda path: manifests.append((path / "manifest.json").exists()))
    remove_old_checkpoints(path.parent, 0)
    assert manifests == [False]


def test_a_replacement_that_was_cut_off_is_ended_with_the_new_checkpoint(tmp_path):
    root = tmp_path / "checkpoints"
    final = publish(root, 10)
    new = final.with_name(final.name + ".tmp")
    shutil.copytree(final, new)
    final.rename(root / ".step-00000010.former")  # killed between the renames; the former is damaged
    next(path for path in (root / ".step-00000010.former").rglob("*.pt")).write_bytes(b"")
    remove_unfinished(root)
    assert list(root.iterdir()) == [final] and fault_of_checkpoint(final) is None
    new.mkdir()  # half written: killed before
    shutil.copytree(final, root / ".step-00000010.former")
    remove_unfinished(root)
    assert list(root.iterdir()) == [final] and fault_of_checkpoint(final) is None


@pytest.mark.parametrize("remove", [set_aside, lambda path: remove_old_checkpoints(path.parent, 0)])
def test_what_is_removed_does_not_come_back_as_its_predecessor(tmp_path, remove):
    final = publish(tmp_path / "checkpoints", 10)
    shutil.copytree(final, final.with_name(f".{final.name}.former"))  # killed before it was removed
    remove(final)
    remove_unfinished(final.parent)
    assert list_checkpoints(final.parent) == []
