"""Files from a URL: continued, compared, refused by name; a directory complete at the end and not before."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core.claims import holder
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import parse_sealed_json, record_file, sealed_json
from mlpmem_ds.core.objects import fetch
from mlpmem_ds.core.objects.contents import directories_in
from mlpmem_ds.core.objects.fetch import fetch_file, pull
from mlpmem_ds.core.objects.listing import FILES
from mlpmem_ds.core.objects.push import Push
from mlpmem_ds.core.objects.store import Store

from ..toy_stage import result_of
from .conftest import LISTS, CountingStore, flip, push, small_directory


class RangeStore(Store):
    """Keeps the ranges that are read; the connection breaks at the byte `breaks_at`."""

    def __init__(self, url: str, *, breaks_at: int | None = None) -> None:
        super().__init__(url)
        self.breaks_at = breaks_at
        self.starts: list[int] = []

    def read_range(self, name: str, start: int, stop: int) -> bytes | None:
        if start == self.breaks_at:
            raise KeyboardInterrupt
        self.starts.append(start)
        return super().read_range(name, start, stop)


@pytest.fixture
def pushed(url: str, stage_dir: Path) -> str:
    Push(directories_in(stage_dir)[0], Store(url)).send()
    return url


def test_finished_parts_are_not_fetched_again(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PART_BYTES", 1000)
    monkeypatch.setattr(fetch, "_PARTS_AHEAD", 0)
    content = np.random.default_rng(0).bytes(4500)
    (tmp_path / "file").write_bytes(content)
    record = record_file(tmp_path, "file")
    Store(url).write("file", content)
    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        fetch_file(RangeStore(url, breaks_at=3000), record, target)
    assert not (target / "file").exists()
    (partial,) = target.iterdir()
    with open(partial, "ab") as stream:  # half a part, as a kill may leave it
        stream.write(b"half")
    store = RangeStore(url)
    fetch_file(store, record, target)
    assert store.starts == [3000, 4000] and (target / "file").read_bytes() == content
    assert [path.name for path in target.iterdir()] == ["file"]


@pytest.mark.parametrize("damage", ["flip", "longer"])
def test_a_damaged_rest_of_a_fetch_is_dropped_and_the_object_not_blamed(
    memory_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """As a power cut leaves it: the size is there, the bytes are zeros."""
    monkeypatch.setattr(fetch, "PART_BYTES", 1000)
    content = np.random.default_rng(0).bytes(4500)
    (tmp_path / "file").write_bytes(content)
    record = record_file(tmp_path, "file")
    Store(memory_url).write("file", content)
    target = tmp_path / "target"
    target.mkdir()
    half = fetch.partial_path(target / "file", record)
    half.write_bytes(bytes(2000) if damage == "flip" else content + bytes(3000))
    fetch_file(Store(memory_url), record, target)
    assert (target / "file").read_bytes() == content and not half.exists()
    half.write_bytes(bytes(2000))
    Store(memory_url).write("file", content[::-1])
    with pytest.raises(DamagedDataError, match=f"{memory_url}/file does not have the checksum"):
        fetch_file(Store(memory_url), record, target)
    assert not half.exists()


def test_two_processes_that_fetch_one_file_both_end_well(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    record = record_file(tmp_path, "file")
    Store(url).write("file", b"content")

    class Overtaken(Store):
        def read(self, name: str) -> bytes | None:
            fetch_file(Store(self.url), record, tmp_path / "target")
            return super().read(name)

    fetch_file(Overtaken(url), record, tmp_path / "target")
    assert (tmp_path / "target/file").read_bytes() == b"content"
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["part-2.npy", "done/3.json", "identity.json", "manifest.json", "run.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "delete"])
def test_a_changed_object_is_refused_with_its_name(
    memory_url: str, stage_dir: Path, tmp_path: Path, name: str, damage: str
) -> None:
    store = Store(memory_url)
    Push(directories_in(stage_dir)[0], store).send()
    content = store.read(name)
    assert content is not None
    if damage == "delete":
        store.remove(name)
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        store.write(name, {"flip": flipped, "truncate": content[:-1], "extend": content + b"x"}[damage])
    with pytest.raises(DamagedDataError, match=f"{memory_url}/{name} "):
        pull(store, tmp_path / "copy", flag="SOURCE")
    assert not (tmp_path / "copy/manifest.json").exists()
    store.write(name, content)
    pull(store, tmp_path / "copy", flag="SOURCE")
    assert result_of(tmp_path / "copy") == result_of(stage_dir)


@pytest.mark.parametrize("fails_at", ["part-0.npy", "part-4.npy", "manifest.json"])
def test_an_interrupted_pull_fetches_the_rest(
    pushed: str, stage_dir: Path, tmp_path: Path, fails_at: str
) -> None:
    first = CountingStore(pushed, fails_at=fails_at)
    with pytest.raises(KeyboardInterrupt):
        pull(first, tmp_path / "copy", flag="SOURCE", threads=1)
    assert not (tmp_path / "copy/manifest.json").exists()
    second = CountingStore(pushed)
    pull(second, tmp_path / "copy", flag="SOURCE", threads=1)
    both = set(first.read_names) & set(second.read_names)
    assert all(name.startswith(".mirror/") for name in both)
    assert result_of(tmp_path / "copy") == result_of(stage_dir)


def test_a_damaged_file_of_the_copy_is_fetched_again(pushed: str, stage_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stage_dir, copy)
    content = (copy / "part-2.npy").read_bytes()
    (copy / "part-2.npy").write_bytes(content[:-1] + b"X")
    pull(Store(pushed), copy, flag="SOURCE")
    assert (copy / "part-2.npy").read_bytes() == content


def test_a_pull_needs_no_space_for_what_is_there(
    memory_url: str, stage_dir: Path, tmp_path: Path, set_free_bytes: Callable[[int], None]
) -> None:
    """Halves of files are gone on with, and damaged files removed before others are fetched."""
    store = Store(memory_url)
    Push(directories_in(stage_dir)[0], store).send()
    copy = tmp_path / "copy"
    shutil.copytree(stage_dir, copy)
    (copy / "manifest.json").unlink()
    half, whole = (record_file(stage_dir, f"part-{number}.npy") for number in (1, 2))
    damaged = record_file(stage_dir, "part-3.npy")
    (copy / half.name).unlink()
    fetch.partial_path(copy / half.name, half).write_bytes(b"half")
    os.replace(copy / whole.name, fetch.partial_path(copy / whole.name, whole))
    (copy / damaged.name).write_bytes(b"longer" * damaged.bytes)
    needed = (stage_dir / "manifest.json").stat().st_size + half.bytes - 4 - 5 * damaged.bytes
    set_free_bytes(needed - 1)
    with pytest.raises(UserError, match=f"needs {needed:,} bytes, and .* has {needed - 1:,} free"):
        pull(store, copy, flag="SOURCE")
    assert (copy / damaged.name).exists()
    set_free_bytes(needed)
    pull(store, copy, flag="SOURCE")
    assert result_of(copy) == result_of(stage_dir)


def test_two_fetches_into_one_directory_at_once_are_refused(
    memory_url: str, stage_dir: Path, tmp_path: Path
) -> None:
    """Each would remove what the other takes for whole. A process that was killed does not count."""
    Push(directories_in(stage_dir)[0], Store(memory_url)).send()
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / ".fetch.claim").write_text(holder(os.getppid()))
    with pytest.raises(UserError, match=r"another process is fetching into .*copy: wait until"):
        pull(Store(memory_url), copy, flag="SOURCE")
    assert [path.name for path in copy.iterdir()] == [".fetch.claim"]
    (copy / ".fetch.claim").write_text(holder(2**22 + 1))
    pull(Store(memory_url), copy, flag="SOURCE")
    assert result_of(copy) == result_of(stage_dir)  # and no claim is left


def test_a_directory_of_something_else_is_not_written_into(
    memory_url: str, stage_dir: Path, tmp_path: Path
) -> None:
    Push(directories_in(stage_dir)[0], Store(memory_url)).send()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"mine holds thesis.tex"):
        pull(Store(memory_url), mine, flag="SOURCE")
    with pytest.raises(UserError, match="is a file"):
        pull(Store(memory_url), mine / "thesis.tex", flag="SOURCE")
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]
    (stage_dir / "identity.json").write_text("{}")
    with pytest.raises(UserError, match="is of another run"):
        pull(Store(memory_url), stage_dir, flag="SOURCE")


@pytest.mark.parametrize("kind", [*LISTS, "model"])
def test_another_directory_with_files_of_the_same_names_is_not_replaced(
    memory_url: str, tmp_path: Path, kind: str
) -> None:
    own, other = (small_directory(tmp_path / name, kind, name) for name in ("own", "other"))
    push(other, memory_url)
    before = result_of(own)
    with pytest.raises(UserError, match=r"own holds another .* than .*, or --replace what is there"):
        pull(Store(memory_url), own, flag="SOURCE")
    assert result_of(own) == before
    pull(Store(memory_url), own, flag="SOURCE", replace=True)
    assert result_of(own) == result_of(other)


@pytest.mark.parametrize("name", ["part-1.npy", "the list"])
@pytest.mark.parametrize("kind", LISTS)
def test_a_damaged_file_of_a_directory_that_lists_its_files_is_fetched_again(
    memory_url: str, tmp_path: Path, kind: str, name: str
) -> None:
    root, copy = small_directory(tmp_path / "root", kind), tmp_path / "copy"
    push(root, memory_url)
    shutil.copytree(root, copy)
    flip(copy / (LISTS[kind][0] if name == "the list" else name))
    pull(Store(memory_url), copy, flag="SOURCE")
    assert result_of(copy) == result_of(root)


@pytest.mark.parametrize("kind", [*LISTS, "model"])
def test_an_interrupted_pull_is_of_no_other_directory(memory_url: str, tmp_path: Path, kind: str) -> None:
    root, copy = small_directory(tmp_path / "root", kind), tmp_path / "copy"
    push(root, memory_url)
    with pytest.raises(KeyboardInterrupt):
        pull(CountingStore(memory_url, fails_at="part-1.npy"), copy, flag="SOURCE", threads=1)
    pull(Store(memory_url), copy, flag="SOURCE")
    assert result_of(copy) == result_of(root)


def rename_in_list(store: Store, name: str, other: str) -> None:
    """Give a file another name in a mirror's list, and every checksum what it should be, as any writer of the
    bucket can."""
    values = parse_sealed_json(store.read(".mirror/000000.json") or b"", "list", remedy="")
    for record in values["files"]:
        record["name"] = other if record["name"] == name else record["name"]
    content = sealed_json(values)
    store.write(".mirror/000000.json", content)
    summary = parse_sealed_json(store.read(FILES) or b"", "files", remedy="")
    summary["lists"][0] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    store.write(FILES, sealed_json(summary))


@pytest.mark.parametrize("other", ["../mine", "done/../../mine", "{tmp_path}/mine"])
def test_a_list_that_names_a_file_elsewhere_is_refused(
    memory_url: str, stage_dir: Path, tmp_path: Path, other: str
) -> None:
    store = Store(memory_url)
    Push(directories_in(stage_dir)[0], store).send()
    rename_in_list(store, "part-1.npy", other.format(tmp_path=tmp_path))
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(DamagedDataError, match=r"\.mirror/000000\.json is damaged"):
        pull(store, tmp_path / "copy", flag="SOURCE")
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "copy").exists()
