"""A directory appears whole or not at all; what killed processes left is removed or continued."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mlpmem_ds.core.directories import (
    bytes_of_stale_work,
    folders_with,
    publish_directory,
    put_back_former,
    refuse_mount,
    remove_former,
    replace_directory,
    work_directory,
)
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.host import process_of, this_process

DEAD = 2**22 + 1  # above the largest process id


def fill(folder: Path, content: str) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "a.txt").write_text(content)


def test_it_appears_at_the_end_in_the_place_of_another(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with publish_directory(tmp_path / "done", temporary=tmp_path / "done.tmp") as temporary:
            fill(temporary, content)
            assert content == "old" or (tmp_path / "done" / "inner" / "a.txt").read_text() == "old"
        assert (tmp_path / "done" / "inner" / "a.txt").read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    with publish_directory(tmp_path / "done", temporary=tmp_path / "done.tmp") as temporary:
        fill(temporary, "old")
    (tmp_path / "done.tmp").mkdir()
    (tmp_path / "done.tmp" / "left.txt").write_text("by a killed run")
    with (
        pytest.raises(OSError, match="full"),
        publish_directory(tmp_path / "done", temporary=tmp_path / "done.tmp") as temporary,
    ):
        assert not list(temporary.iterdir())
        fill(temporary, "new")
        raise OSError("the disk is full")
    assert [path.name for path in tmp_path.iterdir()] == ["done"]
    assert (tmp_path / "done" / "inner" / "a.txt").read_text() == "old"


def filled(folder: Path, content: str) -> Path:
    folder.mkdir()
    fill(folder, content)
    return folder


def content_of(folder: Path) -> str:
    return (folder / "inner" / "a.txt").read_text()


def test_a_kill_between_the_two_renames_is_mended_by_the_next_start(tmp_path: Path) -> None:
    done, new = filled(tmp_path / "done", "old"), filled(tmp_path / "new", "new")
    child = os.fork()
    if child == 0:
        rename, count = os.replace, iter(range(9))
        os.replace = lambda *names: rename(*names) if next(count) == 0 else os._exit(9)  # type: ignore[assignment]
        replace_directory(done, new)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and not done.exists()
    put_back_former(done)
    assert content_of(done) == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "new"]
    filled(tmp_path / ".done.former", "older")  # killed after the second
    put_back_former(done)
    assert content_of(done) == "old" and not (tmp_path / ".done.former").exists()
    os.replace(done, tmp_path / ".done.former")
    replace_directory(done, new)  # the next start may come here first
    assert content_of(done) == "new" and [path.name for path in tmp_path.iterdir()] == ["done"]


def test_what_has_a_successor_is_never_put_back_though_some_of_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file server that keeps the files that somebody has open."""
    done = filled(tmp_path / "done", "old")
    with monkeypatch.context() as patch:
        patch.setattr("mlpmem_ds.core.directories.shutil.rmtree", lambda *_, **__: None)
        replace_directory(done, filled(tmp_path / "new", "new"))
        replace_directory(done, filled(tmp_path / "new", "newer"))
    assert content_of(done) == "newer" and len(list((tmp_path / ".done.gone").iterdir())) == 2
    shutil.rmtree(done)
    put_back_former(done)
    assert list(tmp_path.iterdir()) == []


def test_a_former_that_is_thrown_away_is_not_put_back(tmp_path: Path) -> None:
    done = filled(tmp_path / "done", "new")
    filled(tmp_path / ".done.former", "old")
    remove_former(done)
    shutil.rmtree(done)
    put_back_former(done)
    assert list(tmp_path.iterdir()) == []


def test_who_starts_between_the_two_renames_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, new = filled(tmp_path / "done", "old"), filled(tmp_path / "new", "new")
    children: list[int] = []
    rename = os.replace

    def with_another(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).name == ".done.former":
            children.append(os.fork())
            if children == [0]:
                with contextlib.suppress(Exception):
                    put_back_former(done)
                    os._exit(0 if content_of(done) == "new" else 1)
                os._exit(2)
            time.sleep(0.3)
            assert os.waitpid(children[0], os.WNOHANG) == (0, 0) and not done.exists()

    monkeypatch.setattr(os, "replace", with_another)
    replace_directory(done, new)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
    assert content_of(done) == "new" and [path.name for path in tmp_path.iterdir()] == ["done"]


def test_a_directory_that_cannot_be_replaced_keeps_its_name(tmp_path: Path) -> None:
    done = filled(tmp_path / "done", "old")
    with pytest.raises(FileNotFoundError):
        replace_directory(done, tmp_path / "none")
    assert content_of(done) == "old" and [path.name for path in tmp_path.iterdir()] == ["done"]


@pytest.mark.parametrize("is_dangling", [False, True])
def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path, is_dangling: bool) -> None:
    """Such as of a checkpoint that was moved to another disk."""
    target = tmp_path / "elsewhere"
    if not is_dangling:
        filled(target, "old")
    (tmp_path / "done").symlink_to(target)
    replace_directory(tmp_path / "done", filled(tmp_path / "filled", "new"))
    assert not (tmp_path / "done").is_symlink() and content_of(tmp_path / "done") == "new"
    assert is_dangling or content_of(target) == "old"
    assert {path.name for path in tmp_path.iterdir()} - {"elsewhere"} == {"done"}


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_mount(tmp_path / "out", flag="--output")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(UserError, match="--output .*out is where a file system is mounted: give a directory"):
        refuse_mount(tmp_path / "out", flag="--output")


def test_every_file_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled, calls = tmp_path / "filled", []
    filled.mkdir()
    fill(filled, "x")
    rename = os.replace
    monkeypatch.setattr("mlpmem_ds.core.directories.flush", lambda path: calls.append(path.name))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("rename"), rename(*names)))
    replace_directory(tmp_path / "done", filled)
    assert calls == ["a.txt", "inner", "filled", "rename", tmp_path.name]


def test_a_killed_run_is_continued_and_others_are_removed(tmp_path: Path) -> None:
    dead, live = process_of(DEAD), process_of(os.getppid())
    names = {
        "same": f".out.{dead.name}.partial",
        "another": f".out.{process_of(DEAD + 1).name}.partial",
        "alive": f".out.{live.name}.partial",
        "id used again": f".out.{replace(live, start='1').name}.partial",
        "elsewhere": f".out.{replace(dead, host='elsewhere').name}.partial",
        "same host name": f".out.{replace(dead, boot='0123456789ab').name}.partial",
        "lost": f".out.{replace(dead, host='lost-host').name}.partial",
    }
    for kind, name in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "kind.txt").write_text(kind)
    for path in (tmp_path / names["lost"] / "kind.txt", tmp_path / names["lost"]):
        os.utime(path, (time.time() - 3700,) * 2)  # another host's: given up after an hour
    (tmp_path / names["same"] / f".half.{dead.name}.tmp").write_text("half")
    (tmp_path / "out").mkdir()
    ended = [tmp_path / names[kind] for kind in ("same", "another", "id used again")]
    files = [path for folder in ended for path in folder.iterdir()]
    assert bytes_of_stale_work(tmp_path / "out") == sum(path.stat().st_size for path in files)
    with work_directory(
        tmp_path / "out", continues=lambda path: (path / "kind.txt").read_text() == "same"
    ) as own:
        assert own.name == f".out.{this_process().name}.partial"
        assert [path.name for path in own.iterdir()] == ["kind.txt"]
        assert (own / "kind.txt").read_text() == "same"
        left = {path.name for path in tmp_path.iterdir()} - {"out", own.name}
        assert left == {names["alive"], names["elsewhere"], names["same host name"]}
    assert not own.exists() and bytes_of_stale_work(tmp_path / "out") == 0
    assert bytes_of_stale_work(tmp_path / "none" / "out") == 0


def test_directories_are_found_by_their_files_also_behind_links(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for path in (run / "corpus", run / ".keys.partial", run / "notes", elsewhere / "keys" / "lists"):
        path.mkdir(parents=True)
        (path / ("note.txt" if path.name == "notes" else "identity.json")).touch()
    for path in (elsewhere / "keys" / "identity.json", elsewhere / "keys" / "manifest.json"):
        path.touch()
    (run / "keys").symlink_to(elsewhere / "keys")
    (run / "latest").symlink_to(run / "keys")
    (run / "texts").symlink_to(tmp_path)  # of none of these names: not walked through
    (elsewhere / "keys" / "back").symlink_to(run / "corpus")
    found = dict(folders_with(run, ("identity.json", "manifest.json")))
    assert {str(path.relative_to(run)): len(names) for path, names in found.items()} == {
        "corpus": 1,
        "keys": 2,
        "keys/lists": 1,
    }
    assert dict(folders_with(tmp_path / "none", ("identity.json",))) == {}
