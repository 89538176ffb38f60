"""Directories of the cache: what they count for."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

from mlpmem_ds.core.files import FileRecord, publish_json, read_sealed_json
from mlpmem_ds.core.objects import homes
from mlpmem_ds.core.objects.cache import Cache
from mlpmem_ds.core.objects.fetch import partial_path
from mlpmem_ds.core.objects.homes import contents, counted_already

from .conftest import stages


def record(name: str, num_bytes: int) -> FileRecord:
    return FileRecord(name=name, bytes=num_bytes, sha256="0" * 64)


def test_what_is_reserved_or_left_of_a_file_counts_already(corpus_copy: Path, cache: Cache) -> None:
    """A file of any kind by what is there of it; one that every fetch brings also by what is reserved."""
    place = corpus_copy.parent / "source.json"
    (corpus_copy / "old").write_bytes(bytes(300))
    half = record("train/tokens-7.bin", 5000)
    partial_path(corpus_copy / half.name, half).write_bytes(b"half")
    shard, other = record("train/tokens-8.bin", 70), record("other", 1000)
    (now,) = contents(cache.root)
    assert now.num_awaited == 0
    assert counted_already([now], corpus_copy, [half, shard]) == 5000
    assert counted_already([now], corpus_copy, [record("old", 400), other]) == 300
    publish_json(place, {**read_sealed_json(place), "reserved": now.num_bytes + 600}, seal=True)
    (now,) = contents(cache.root)
    assert now.num_bytes - now.num_awaited == sum(
        homes.bytes_of(path) for path in homes.files_below(corpus_copy.parent)
    )
    awaited = now.num_awaited
    assert 500 < awaited < 700  # source.json may have grown
    assert counted_already([now], corpus_copy, [other]) == awaited
    assert counted_already([now], corpus_copy, [record("old", 400)]) == 300 + 400
    assert counted_already([now], corpus_copy, [half, shard]) == 5000
    assert counted_already([now], cache.root / "elsewhere/run", [other]) == 0


def test_what_another_process_drops_in_this_moment_is_passed_over(
    memory_url: str, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one, two), _ = stages(tmp_path, memory_url, 2)
    with contextlib.ExitStack() as held:
        roots = [cache.open(url, held, flag="--keys") for url in (one, two)]
    source_of = homes.source_of

    def and_drop(home: Path) -> homes.Source | None:
        source = source_of(home)
        if home == roots[0].parent:
            shutil.rmtree(home)
        return source

    monkeypatch.setattr(homes, "source_of", and_drop)
    assert [content.source.url for content in cache.contents()] == [two]
