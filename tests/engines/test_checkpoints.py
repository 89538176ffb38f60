"""Saving and finding checkpoints, with a writer of the test's own in place of DeepSpeed."""

import os
import shutil
from collections import namedtuple

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.checkpoints import find_checkpoint, save_checkpoint

from ..manifests import checkpoint_manifest


def save(root, step, *, content=b"weights", keep=9, num_parameters=10):
    def write(name):
        (root / name / "inside").mkdir(parents=True)
        (root / name / "inside" / "rank0.pt").write_bytes(content)

    def describe(files):
        return checkpoint_manifest(
            step=step, values={"batches": step}, subject={"memory": "small"}, files=files
        )

    return save_checkpoint(
        root, step, write=write, describe=describe, num_parameters=num_parameters, keep=keep, world=World()
    )


def find(root, copies=None, **subject):
    return find_checkpoint(root, copies=copies, subject=subject, world=World())


def test_the_newest_is_found_and_only_so_many_are_kept(tmp_path):
    root = tmp_path / "checkpoints"
    assert find(root) is None
    for step in (3, 5, 12):
        assert save(root, step, keep=2).name == f"step-{step:08d}"
    assert sorted(path.name for path in root.iterdir()) == ["step-00000005", "step-00000012"]
    found = find(root, memory="small")
    assert found.step == 12 and found.manifest.values == {"batches": 12}


def test_a_damaged_one_is_set_aside_and_a_copy_is_as_good(tmp_path):
    root, copies = tmp_path / "checkpoints", tmp_path / "copies"
    for step in (3, 5):
        save(root, step)
    shutil.copytree(root / "step-00000003", copies / "step-00000003")
    for step in (3, 5):
        (root / f"step-{step:08d}" / "inside" / "rank0.pt").write_bytes(b"weighty")
    assert find(root, copies).path == copies / "step-00000003"
    assert sorted(path.name for path in root.iterdir()) == ["step-00000003.damaged", "step-00000005.damaged"]
    with pytest.raises(UserError, match="2 damaged.*start anew"):
        find(root)


def test_what_a_killed_save_left_is_removed(tmp_path):
    root = tmp_path / "checkpoints"
    save(root, 3)
    (root / "step-00000005.tmp").mkdir()
    assert find(root).step == 3 and not (root / "step-00000005.tmp").exists()


def test_another_training_is_refused(tmp_path):
    save(tmp_path / "checkpoints", 3)
    with pytest.raises(UserError, match="its memory differs"):
        find(tmp_path / "checkpoints", memory="large")


def test_a_full_disk_is_told_before_and_while_writing(tmp_path, monkeypatch):
    root = tmp_path / "checkpoints"
    save(root, 3)
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match="files need 1.40 GB.*has 0.00 GB free"):
            save(root, 5, num_parameters=10**8)

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="step 5 could not be written.*No space left.*untouched"):
        save(root, 5)
    monkeypatch.undo()
    assert [path.name for path in root.iterdir()] == ["step-00000003"] and find(root).step == 3
