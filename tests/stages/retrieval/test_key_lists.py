"""Keys in the order of the lists: each list is its keys, in runs of any length; targets do not depend on
them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core import claims
from mlpmem_ds.core.claims import holder
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.formats import lists_directory as layout
from mlpmem_ds.formats.index_directory import open_index
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.retrieval.key_lists import ListsInUse, make_key_lists, missing_bytes, remove_key_lists
from mlpmem_ds.stages.retrieval.neighbour_search import open_search
from mlpmem_ds.stages.targets import write_targets
from mlpmem_ds.stages.targets.teacher import Teacher

NUM_KEYS, DIM, VOCAB_SIZE = 403, 6, 40


@pytest.fixture(scope="module")
def keys(make_keys: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    codes = generator.integers(-6, 7, size=(NUM_KEYS, DIM)).astype(np.int8)
    values = generator.integers(0, VOCAB_SIZE, NUM_KEYS)
    root = tmp_path_factory.mktemp("keys") / "keys"
    return make_keys(root, codes, values, vocab_size=VOCAB_SIZE, unit_positions=96, block_size=8)


@pytest.fixture(scope="module")
def index(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("index") / "index"
    build_index.run(build_index.Config(keys=keys, output=root, factory="IVF7,Flat", num_shards=3), World())
    return root


def config(keys: Path, index: Path, output: Path, **changes: Any) -> write_targets.Config:
    settings = {"k": 20, "temperature": "6", "shard_positions": 104, "search": "ivf", "nprobe": 3, **changes}
    return write_targets.Config(keys=keys, index=index, output=output, **settings)


def shards_of(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.glob("knn-*"))}


@pytest.mark.parametrize("run_positions", [10**6, 150, 96, 40])
def test_a_list_is_its_keys(
    keys: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_positions: int
) -> None:
    monkeypatch.setattr(layout, "RUN_POSITIONS", run_positions)
    stored, opened = open_keys(keys), open_index(index)
    nearest = Index.read(index / "trained.faissindex").assign(stored.read("keys"), 1)[:, 0]
    for rank in range(2):  # the second finds what the first has made
        mapped = make_key_lists(tmp_path / "lists", stored, opened, World(rank=rank, size=2))
    lists = mapped.keys
    assert len(lists.runs) == -(-NUM_KEYS // run_positions) and lists.sizes_L.sum() == NUM_KEYS
    for number in range(7):
        ids = lists.ids_of(number)
        found, norms = lists.keys_of(number)
        expected = stored.read("keys")[nearest == number]
        assert np.array_equal(ids, np.flatnonzero(nearest == number)) and np.array_equal(
            found.numpy(), expected
        )
        assert norms is not None and np.array_equal(norms.numpy(), (expected.astype(int) ** 2).sum(1))
    values = stored.read("values")
    positions = np.random.default_rng(2).integers(0, NUM_KEYS, (5, 70))
    assert np.array_equal(mapped.values_of(positions), values[positions])
    assert np.array_equal(sum(mapped.counts), np.bincount(values, minlength=VOCAB_SIZE))
    assert np.array_equal(mapped.sizes_L, np.bincount(nearest, minlength=7))
    there = sum(path.stat().st_size for path in (tmp_path / "lists").glob("*.npy"))
    assert missing_bytes(tmp_path / "lists", stored, opened) < there / 10
    if run_positions > NUM_KEYS:
        whole = missing_bytes(tmp_path / "none", stored, opened)
        assert there - 128 * 5 <= whole < there  # a header each
    remove_key_lists(tmp_path / "lists")
    assert not list(tmp_path.iterdir())


def test_targets_do_not_depend_on_runs_or_on_where_the_lists_lie(
    keys: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_targets.run(config(keys, index, tmp_path / "one"), World())
    expected = shards_of(tmp_path / "one")
    assert len(expected) == 8 and not (tmp_path / "one" / "lists").exists()
    monkeypatch.setattr(layout, "RUN_POSITIONS", 50)
    for name in ("two", "three"):  # made, kept, and found again
        write_targets.run(config(keys, index, tmp_path / name, lists=tmp_path / "kept"), World())
        assert shards_of(tmp_path / name) == expected
    made = [line for line in (tmp_path / "kept" / "log.jsonl").read_text().splitlines() if '"unit"' in line]
    assert len(made) == 3 + 9 + 1  # shards, runs, sizes: once


def test_many_runs_lie_in_folders(
    keys: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "RUN_POSITIONS", 50)
    stored, opened = open_keys(keys), open_index(index)
    one = make_key_lists(tmp_path / "one", stored, opened, World())
    monkeypatch.setattr(layout, "folder_of", lambda number, count: f"{number // 4:04d}/")
    many = make_key_lists(tmp_path / "many", stored, opened, World())
    found = sorted(path.parent.name for path in (tmp_path / "many").glob("0*/run-*.npy"))
    assert found == ["0000"] * 4 + ["0001"] * 4 + ["0002"]
    assert missing_bytes(tmp_path / "many", stored, opened) == missing_bytes(tmp_path / "one", stored, opened)
    for number in range(7):
        assert np.array_equal(many.keys.ids_of(number), one.keys.ids_of(number))


def test_lists_without_codes_give_the_same_targets(keys: Path, index: Path, tmp_path: Path) -> None:
    write_targets.run(config(keys, index, tmp_path / "codes"), World())
    build = build_index.Config(keys=keys, output=tmp_path / "index", factory="IVF7", num_shards=3)
    build_index.run(build, World())
    write_targets.run(config(keys, tmp_path / "index", tmp_path / "lists_alone"), World())
    assert shards_of(tmp_path / "lists_alone") == shards_of(tmp_path / "codes")
    with pytest.raises(UserError, match="lists without codes .*--factory auto"):
        open_search(open_keys(keys), open_index(tmp_path / "index"), how="index")


def test_before_the_lists_lie_there_the_search_is_the_same(
    keys: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, gathered = (
        Teacher(
            keys=open_keys(keys),
            search=open_search(open_keys(keys), open_index(index), how="lists", nprobe=3, lists=lists),
            k=20,
        )
        for lists in (tmp_path / "lists", None)
    )
    stored.prepare()
    positions = np.arange(0, NUM_KEYS, 7)[::-1]
    expected = stored.find(positions).unpack()
    for most in (1 << 28, 900, 1):
        monkeypatch.setattr("mlpmem_ds.stages.retrieval.list_search._GATHERED_BYTES", most)
        found = gathered.find(positions).unpack()
        assert np.array_equal(found.ids_QK, expected.ids_QK)
        assert np.array_equal(found.distances_QK, expected.distances_QK)
    assert np.array_equal(gathered.list_sizes(positions), stored.list_sizes(positions))
    assert np.array_equal(gathered.values_of(expected.ids_QK), stored.values_of(expected.ids_QK))


def test_what_is_wrong_with_lists_is_named_and_nothing_is_written(
    keys: Path, index: Path, make_keys: Callable[..., Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    build_index.run(build_index.Config(keys=keys, output=other, factory="IVF5,Flat"), World())
    write_targets.run(config(keys, other, tmp_path / "targets", lists=tmp_path / "lists"), World())
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    for name, words in (
        ("lists", "holds something else than the keys"),
        ("file", "is a file"),
        ("full", "is not empty"),
    ):
        with pytest.raises(UserError, match=f"--lists .*{name} {words}"):
            write_targets.run(config(keys, index, tmp_path / "new", lists=tmp_path / name), World())
        assert not (tmp_path / "new").exists()


def test_an_index_of_other_keys_in_a_shard_is_damaged(keys: Path, index: Path, tmp_path: Path) -> None:
    opened = open_index(index)
    swapped = [opened.shard_paths[place] for place in (1, 0, 2)]

    class Swapped:
        root, sha256, num_lists, shard_paths = opened.root, opened.sha256, opened.num_lists, swapped
        has_codes = opened.has_codes

        def check(self, name: str) -> None:
            opened.check(name)

    with pytest.raises(
        DamagedDataError, match="does not hold the keys that are its share: build the index again"
    ):
        make_key_lists(tmp_path / "lists", open_keys(keys), Swapped(), World())  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["this host", "another host"])
def test_killed_readers_of_any_host_leave_no_lists_and_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """That of another host is known to be gone when its claim has not changed for a minute: here .2 s."""
    monkeypatch.setattr(claims, "_SECONDS_UNTIL_DEAD", 0.2)
    (tmp_path / layout.FOLDER).mkdir()
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = tmp_path / ".lists-left.claim"
    left.write_text(holder(ended.pid) if host == "this host" else f"elsewhere boot {ended.pid}")
    lists = ListsInUse(tmp_path)
    with lists.hold():
        assert left.exists() == (host == "another host")
    lists.remove_unless_held()
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_lives_keeps_the_lists(tmp_path: Path) -> None:
    (tmp_path / layout.FOLDER).mkdir()
    lists, other = ListsInUse(tmp_path), tmp_path / ".lists-other.claim"
    other.write_text(holder(os.getppid()))
    with lists.hold():
        lists.remove_unless_held()
    assert {path.name for path in tmp_path.iterdir()} == {layout.FOLDER, other.name}
