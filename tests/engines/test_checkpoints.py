"""Saving and finding checkpoints, with a writer of the test's own in place of DeepSpeed."""

import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines import checkpoints
from mlpmem_ds.engines.checkpoints import discard_checkpoints, find_checkpoint, save_checkpoint
from mlpmem_ds.formats.checkpoint import list_checkpoints

from ..manifests import checkpoint_manifest


def save(root, step, *, content=b"weights", keep=9, num_bytes=10, failure=None, **subject):
    def write(name):
        (root / name / "inside").mkdir(parents=True)
        (root / name / "inside" / "rank0.pt").write_bytes(content)
        if failure is not None:
            raise failure

    def describe(files):
        subject_of_all = {"memory": "small", **subject}
        return checkpoint_manifest(step=step, values={"batches": step}, subject=subject_of_all, files=files)

    return save_checkpoint(
        root, step, write=write, describe=describe, num_bytes=num_bytes, keep=keep, world=World()
    )


def find(root, copies=None, **subject):
    return find_checkpoint(root, copies=copies, subject=subject, world=World())


def discard(root, copies=None, **subject):
    discard_checkpoints(root, copies=copies, subject=subject, world=World())


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


def test_the_remedy_for_damaged_ones_is_of_the_places_that_hold_them(tmp_path):
    """The disk of OUTPUT is lost, and the only copy is damaged."""
    root, copies = tmp_path / "checkpoints", tmp_path / "copies"

    def refuse():
        with pytest.raises(UserError) as error:
            find(root, copies)
        return str(error.value)

    save(copies, 3)
    (copies / "step-00000003" / "inside" / "rank0.pt").write_bytes(b"weighty")
    for said in (refuse(), refuse()):  # also when it is set aside
        assert f"is whole (1 damaged in {copies}): " in said and str(root) not in said
    assert "--resume never to start anew" in said
    discard(root, copies)
    assert find(root, copies) is None

    for place in (root, copies):
        save(place, 3)
        (place / "step-00000003" / "inside" / "rank0.pt").write_bytes(b"weighty")
    assert f"is whole (2 damaged in {root} and {copies}): " in refuse()


def test_what_a_killed_save_left_is_removed(tmp_path):
    root = tmp_path / "checkpoints"
    save(root, 3)
    (root / "step-00000005.tmp").mkdir()
    assert find(root).step == 3 and not (root / "step-00000005.tmp").exists()


def test_another_training_is_refused(tmp_path):
    save(tmp_path / "checkpoints", 3)
    with pytest.raises(UserError, match="its memory differs"):
        find(tmp_path / "checkpoints", memory="large")


def test_copies_of_another_run_are_refused_wherever_they_stand(tmp_path):
    """Older than the own newest one, or damaged: the copies of this run would take their place."""
    root, copies = tmp_path / "checkpoints", tmp_path / "copies"
    save(copies, 3, identity="a")
    save(root, 5, identity="b")
    (copies / "step-00000003" / "inside" / "rank0.pt").write_bytes(b"weighty")
    for look in (find, discard):
        with pytest.raises(UserError, match="step-00000003 is of another.*other flags or inputs.*--copy-to"):
            look(root, copies, memory="small", identity="b")
    assert [path.name for place in (root, copies) for path in place.iterdir()] == [
        "step-00000005",
        "step-00000003",
    ]
    with pytest.raises(UserError, match="step-00000005 is of another training"):
        find(root, memory="small", identity="a")


def test_what_a_provenance_says_of_flags_and_not_how_tells_trainings_apart(tmp_path):
    """Flags may be given by a recipe, or chosen for a reason, and a program may say it in other words."""
    provenance = {"corpus": "a", "alpha": 0.5, "recipe": "paper", "objective_reason": "the base is weak"}
    same = {"corpus": "a", "alpha": 0.5, "recipe": None, "objective_reason": None, "earlier_layers": []}
    other = {**same, "alpha": 0.4}
    save(tmp_path / "named", 3, provenance=provenance, identity="a")
    save(tmp_path / "unnamed", 3, provenance=provenance)
    for root in (tmp_path / "named", tmp_path / "unnamed"):
        assert find(root, memory="small", provenance=same, identity="a").step == 3
    with pytest.raises(UserError, match="its provenance differs"):
        find(tmp_path / "unnamed", memory="small", provenance=other, identity="a")
    with pytest.raises(UserError, match="other flags or inputs"):
        find(tmp_path / "named", memory="small", provenance=other, identity="b")


def test_copies_that_name_no_run_are_taken_with_a_warning(tmp_path, caplog):
    """Of an earlier program; the own ones without it."""
    root, copies = tmp_path / "checkpoints", tmp_path / "copies"
    for place in (root, copies):
        save(place, 3)
    assert find(root, copies, memory="small", identity="a").path.parent == root and not caplog.records
    shutil.rmtree(root)
    assert find(root, copies, memory="small", identity="a").path.parent == copies
    assert "does not name its flags" in caplog.text
    with pytest.raises(UserError, match="its memory differs"):
        find(root, copies, memory="large", identity="a")


def test_all_is_discarded_at_both_places(tmp_path):
    """Also what was set aside, and what a replacement that was cut off would put back."""
    root, copies = tmp_path / "checkpoints", tmp_path / "copies"
    for place in (root, copies):
        for step in (3, 5, 7):
            save(place, step, identity="a")
        (place / "step-00000005").rename(place / "step-00000005.damaged")
        (place / "step-00000007").rename(place / ".step-00000007.former")
    discard(root, copies, memory="small", identity="a")
    assert not [*root.iterdir(), *copies.iterdir()]
    assert find(root, copies, memory="small", identity="a") is None
    discard(tmp_path / "none", tmp_path / "neither")


def test_a_full_disk_is_told_before_and_while_writing(tmp_path, monkeypatch):
    root = tmp_path / "checkpoints"
    save(root, 3)
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match="files need 1.40 GB.*has [0-9.]+ bytes free"):
            save(root, 5, num_bytes=14 * 10**8)

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"step 5 could not be written.*No space left.*ulimit -f.*untouched"):
        save(root, 5)
    monkeypatch.undo()
    assert [path.name for path in root.iterdir()] == ["step-00000003"] and find(root).step == 3


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1"),
        torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1234, remote process exited"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_what_is_no_fault_of_the_disk_is_not_reported_as_a_full_one(tmp_path, failure):
    """A rank that dies while the others wait for its files: all of them are to be started again."""
    root = tmp_path / "checkpoints"
    save(root, 3)
    with pytest.raises(type(failure)) as raised:
        save(root, 5, failure=failure)
    assert raised.value is failure
    assert find(root).step == 3 and [path.name for path in root.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0",
        "basic_ios::clear: iostream error",
        "File /run/checkpoints/step-00000005.tmp/rank0.pt cannot be opened.",
        "Parent directory /run/checkpoints/step-00000005.tmp does not exist.",
        "No space left on device",
    ],
)
def test_a_library_that_could_not_write_is_told_as_the_system_would_be(tmp_path, words):
    root = tmp_path / "checkpoints"
    save(root, 3)
    with pytest.raises(UserError, match="step 5 could not be written.*free some space"):
        save(root, 5, failure=RuntimeError(words))
    assert [path.name for path in root.iterdir()] == ["step-00000003"]


def listings(size):
    """What each of `size` ranks sees where its listing lacks the others' newest file."""
    shared = [f"state-{rank}" for rank in range(size)]
    return [[*shared, f"newest-{rank}"] for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_no_file_is_left_out_where_listings_are_stale(size):
    """Each file is hashed by one rank, which sees it."""
    seen = listings(size)
    shares = [checkpoints.share_of_names(seen, rank) for rank in range(size)]
    assert sorted(sum(shares, [])) == sorted({name for names in seen for name in names})
    assert all(set(share) <= set(names) for share, names in zip(shares, seen, strict=True))
    everyone = [seen[0]] * size
    assert {len(checkpoints.share_of_names(everyone, rank)) for rank in range(size)} <= {
        len(seen[0]) // size,
        -(-len(seen[0]) // size),
    }


def test_two_ranks_with_stale_listings_publish_all_files_and_find_the_same(tmp_path, monkeypatch):
    """Two threads stand for two hosts: each sees its own files and none that the other wrote."""
    root, rank_of = tmp_path / "checkpoints", threading.local()
    values, barrier = {}, threading.Barrier(2, timeout=30)

    def gather_values(value, world):
        values[world.rank] = value
        barrier.wait()
        gathered = [values[rank] for rank in range(2)]
        barrier.wait()
        return gathered

    whole = Path.rglob

    def stale(path, pattern):
        return [found for found in whole(path, pattern) if f"rank{1 - rank_of.value}" not in found.name]

    monkeypatch.setattr(checkpoints, "gather_values", gather_values)
    monkeypatch.setattr(checkpoints, "wait_for_all", lambda world: barrier.wait())
    monkeypatch.setattr(Path, "rglob", stale)
    monkeypatch.setattr(
        checkpoints, "list_checkpoints", lambda place: list_checkpoints(place) if rank_of.value == 0 else []
    )
    found = {}

    def work(rank):
        rank_of.value, world = rank, World(rank=rank, size=2)

        def write(name):
            (root / name).mkdir(exist_ok=True)
            (root / name / f"rank{rank}.pt").write_bytes(bytes([rank]))

        def describe(files):
            return checkpoint_manifest(step=3, world=2, files=files)

        save_checkpoint(root, 3, write=write, describe=describe, num_bytes=1, keep=2, world=world)
        found[rank] = find_checkpoint(root, copies=None, subject={}, world=world)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.name for record in found[0].manifest.files] == ["rank0.pt", "rank1.pt"]
    assert found[1] == found[0]
