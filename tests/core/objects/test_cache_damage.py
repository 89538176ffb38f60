"""No file of the cache is believed because it is there: what differs is fetched again, or refused."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core import files
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.objects import cache as cache_module
from mlpmem_ds.core.objects.cache import Cache
from mlpmem_ds.core.objects.store import Store
from mlpmem_ds.core.temporaries import time_of_file_system
from mlpmem_ds.formats.corpus import open_corpus

from ..toy_stage import result_of
from .conftest import flip


@pytest.mark.parametrize("name", ["part-1.npy", "identity.json", "done/2.json", "manifest.json"])
def test_a_flipped_bit_is_fetched_again_by_the_next_command(
    stage_url: str, stage_dir: Path, cache: Cache, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with contextlib.ExitStack() as held:
        root = cache.open(stage_url, held, flag="--keys")
    flip(root / name)
    with contextlib.ExitStack() as held, caplog.at_level("WARNING"):
        cache.open(stage_url, held, flag="--keys")
    assert result_of(root) == result_of(stage_dir)
    assert f"{root / name} in the cache is damaged: fetching it again" in caplog.text


def test_the_reader_of_a_damaged_copy_is_told_to_give_the_same_command(corpus_copy: Path) -> None:
    flip(next((corpus_copy / "tokenizer").iterdir()))
    with pytest.raises(DamagedDataError, match=r"checksum of its record: .* the same command again, which"):
        open_corpus(corpus_copy, "test").check_files()


def test_ranks_that_wait_for_the_first_do_not_compare_again_and_later_ones_do(
    stage_url: str, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as held:
        home = cache.open(stage_url, held, flag="--keys").parent
    asked = time_of_file_system(home)
    os.utime(home / ".compared", (asked - 1, asked - 1))
    compared: list[Path] = []

    def not_whole(root: Path, records: list[files.FileRecord]) -> list[files.FileRecord]:
        compared.append(root)
        return []

    monkeypatch.setattr(cache_module, "not_whole", not_whole)
    with contextlib.ExitStack() as held:
        cache.open(stage_url, held, flag="--keys")
    assert len(compared) == 1
    os.utime(home / ".compared", (asked + 3600, asked + 3600))  # another's, while this one waited
    with contextlib.ExitStack() as held:
        cache.open(stage_url, held, flag="--keys")
    assert len(compared) == 1
    # This one looked at sizes only, which is nothing for those who asked since that other one.
    assert (home / ".compared").stat().st_mtime == pytest.approx(asked + 3600)


def test_a_flipped_bit_of_a_shard_is_fetched_again_when_it_is_read(corpus_copy: Path) -> None:
    corpus = open_corpus(corpus_copy, "test")
    tokens = np.array(corpus.tokens(0, corpus.num_tokens))
    (shard,) = corpus_copy.glob("test/tokens-*.bin")
    flip(shard)
    np.testing.assert_array_equal(open_corpus(corpus_copy, "test").tokens(0, corpus.num_tokens), tokens)


def test_a_shard_that_is_dropped_while_it_is_compared_is_fetched_again(
    corpus_copy: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = open_corpus(corpus_copy, "test")
    tokens = np.array(corpus.tokens(0, corpus.num_tokens))
    (shard,) = corpus_copy.glob("test/tokens-*.bin")
    os.utime(shard, (0, shard.stat().st_mtime))
    cache._marked.clear()
    fault_of_content = cache_module.fault_of_content
    used: list[float] = []

    def and_drop(folder: Path, record: files.FileRecord) -> str | None:
        fault = fault_of_content(folder, record)
        if folder / record.name == shard and not used:
            used.append(shard.stat().st_atime)
            shard.unlink()
        return fault

    monkeypatch.setattr(cache_module, "fault_of_content", and_drop)
    np.testing.assert_array_equal(open_corpus(corpus_copy, "test").tokens(0, corpus.num_tokens), tokens)
    assert used and time.time() - used[0] < 600  # in use before it was compared
    assert shard.exists()


def test_a_changed_object_is_refused_with_its_name(
    stage_url: str, cache: Cache, held: contextlib.ExitStack
) -> None:
    Store(stage_url).write("part-1.npy", b"short")
    with pytest.raises(DamagedDataError, match=f"{stage_url}/part-1.npy is cut short"):
        cache.open(stage_url, held, flag="--keys")
    with pytest.raises(UserError, match=f"--keys {stage_url}/none holds no mirror"):
        cache.open(f"{stage_url}/none", held, flag="--keys")


def test_a_missing_shard_is_refused_with_its_name(corpus_copy: Path, memory_url: str) -> None:
    store = Store(memory_url)
    (name,) = (name for name in store.sizes("test") if "tokens-" in name)
    store.remove(name)
    with pytest.raises(DamagedDataError, match=f"{memory_url}/{name} is missing"):
        open_corpus(corpus_copy, "test").tokens(0, 1)
