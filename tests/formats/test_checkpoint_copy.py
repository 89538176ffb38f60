"""Checkpoints under a crash at every file operation; the second place for them."""

import errno
import os
import shutil
import threading
from pathlib import Path

from mlpmem_ds.formats.checkpoint import (
    checkpoint_name,
    fault_of_checkpoint,
    list_checkpoints,
    publish_checkpoint,
    read_checkpoint,
    record_and_flush,
    remove_old_checkpoints,
    remove_unfinished,
)
from mlpmem_ds.formats.checkpoint_copy import CheckpointCopier, copy_checkpoint

from ..manifests import checkpoint_manifest

NAMES = ("b.pt", "inner/a.pt", "inner/c.pt")


class CrashError(BaseException):
    """The process ends here: nothing after it runs, not even what catches exceptions."""


def save(root, step, content):
    """What the engine does on one rank."""
    publish(root, step, content)
    remove_old_checkpoints(root, 1)


def publish(root, step, content):
    remove_unfinished(root)
    directory = root / f"{checkpoint_name(step)}.tmp"
    (directory / "inner").mkdir(parents=True)
    for name in NAMES:
        (directory / name).write_bytes(content * 50)
    files = tuple(record_and_flush(directory, NAMES))
    publish_checkpoint(root, checkpoint_manifest(step=step, files=files))


def crash_at(monkeypatch, number):
    """The file operation of this number (from 0) is not done, and nothing after it. Gives the count of
    operations."""
    count = [0]

    def guard(function):
        def guarded(*arguments, **options):
            count[0] += 1
            if count[0] > number:
                raise CrashError
            return function(*arguments, **options)

        return guarded

    for owner, name in (
        (os, "replace"),
        (os, "fsync"),
        (os, "unlink"),
        (os, "rmdir"),
        (Path, "write_bytes"),
        (Path, "unlink"),
        (Path, "mkdir"),
    ):
        monkeypatch.setattr(owner, name, guard(getattr(owner, name)))
    return count


def test_a_crash_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Also while the same step is saved again over its own earlier checkpoint, and while old ones are
    removed."""
    for steps in ((1, 2), (1, 1)):
        for number in range(1000):
            root = tmp_path / f"{steps[1]}-{number}" / "checkpoints"
            root.mkdir(parents=True)
            save(root, steps[0], b"old")
            with monkeypatch.context() as patch:
                crash_at(patch, number)
                try:
                    save(root, steps[1], b"new")
                    is_done = True
                except CrashError:
                    is_done = False
            whole = [path for path in list_checkpoints(root) if fault_of_checkpoint(path) is None]
            assert whole, number
            assert len({(whole[0] / name).read_bytes()[:3] for name in NAMES}) == 1
            save(root, 3, b"end")  # the next start's save is not disturbed by what is left
            assert [path.name for path in list_checkpoints(root)] == ["step-00000003"]
            if is_done:
                break
        assert is_done and number > 15


def test_copies_are_whole_verified_and_kept(tmp_path):
    root, copies = tmp_path / "run" / "checkpoints", tmp_path / "far" / "copies"
    copier = CheckpointCopier(copies, keep=2)
    for step in (1, 2, 3):
        save(root, step, bytes([step]))
        copier.start(root / checkpoint_name(step))
        copier.wait()
    assert [path.name for path in list_checkpoints(copies)] == ["step-00000003", "step-00000002"]
    assert all(fault_of_checkpoint(path) is None for path in list_checkpoints(copies))
    assert (
        read_checkpoint(copies / "step-00000003").manifest == read_checkpoint(root / "step-00000003").manifest
    )


def test_no_step_waits_for_a_slow_target(tmp_path, monkeypatch, caplog):
    """The one in work stays at its first place, those that are kept anyway wait, older ones are left out."""
    root, copies = tmp_path / "run" / "checkpoints", tmp_path / "far" / "copies"
    is_free, begun, copyfile = threading.Event(), threading.Event(), shutil.copyfile

    def slowly(*names):
        begun.set()
        assert is_free.wait(30)
        return copyfile(*names)

    monkeypatch.setattr(shutil, "copyfile", slowly)
    copier = CheckpointCopier(copies, keep=2)
    for step in (1, 2, 3, 4):
        publish(root, step, bytes([step]))
        needed = copier.start(root / checkpoint_name(step))
        remove_old_checkpoints(root, keep=2, needed=needed)
        assert begun.wait(30)
    assert [path.name for path in list_checkpoints(root)] == [checkpoint_name(step) for step in (4, 3, 1)]
    assert "step-00000002 is not copied: copies to --copy-to" in caplog.text
    is_free.set()
    copier.wait()
    assert [path.name for path in list_checkpoints(copies)] == ["step-00000004", "step-00000003"]
    assert all(fault_of_checkpoint(path) is None for path in list_checkpoints(copies))


def test_a_copy_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    root, copies = tmp_path / "run" / "checkpoints", tmp_path / "copies"
    save(root, 1, b"one")
    copy_checkpoint(root / checkpoint_name(1), copies)
    shutil.move(root / checkpoint_name(1), root / checkpoint_name(2))

    def is_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", is_full)
        copier = CheckpointCopier(copies, keep=2)
        copier.start(root / checkpoint_name(2))
        copier.wait()
    assert "No space left" in caplog.text and "training goes on" in caplog.text
    (root / checkpoint_name(2) / "b.pt").write_bytes(b"flipped" * 50)
    copier.start(root / checkpoint_name(2))
    copier.wait()
    assert "copied wrongly" in caplog.text
    assert [path.name for path in copies.iterdir()] == ["step-00000001"]
