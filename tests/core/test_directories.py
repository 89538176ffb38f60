"""A directory appears whole or not at all; what killed processes left is removed or continued."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

import pytest

from mlpmem_ds.core.directories import (
    publish_directory,
    put_back_former,
    remove_former,
    replace_directory,
    work_directory,
)
from mlpmem_ds.core.host import host_name, start_of

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
    host = host_name()
    names = {
        "same": f".out.{host}.{DEAD}.partial",
        "another": f".out.{host}.{DEAD + 1}.partial",
        "alive": f".out.{host}.{os.getppid()}-{start_of(os.getppid())}.partial",
        "id used again": f".out.{host}.{os.getppid()}-1.partial",
        "elsewhere": f".out.elsewhere.{DEAD}.partial",
        "lost": f".out.lost-host.{DEAD}.partial",
    }
    for kind, name in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "kind.txt").write_text(kind)
    for path in (tmp_path / names["lost"] / "kind.txt", tmp_path / names["lost"]):
        os.utime(path, (time.time() - 3700,) * 2)  # another host's: given up after an hour
    (tmp_path / names["same"] / f".half.{host}.{DEAD}.tmp").write_text("half")
    (tmp_path / "out").mkdir()
    with work_directory(
        tmp_path / "out", continues=lambda path: (path / "kind.txt").read_text() == "same"
    ) as own:
        assert own.name == f".out.{host}.{os.getpid()}-{start_of(os.getpid())}.partial"
        assert [path.name for path in own.iterdir()] == ["kind.txt"]
        assert (own / "kind.txt").read_text() == "same"
        left = {path.name for path in tmp_path.iterdir()} - {"out", own.name}
        assert left == {names["alive"], names["elsewhere"]}
    assert not own.exists()
