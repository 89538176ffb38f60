"""Files of a directory in the cache are fetched when they are first read."""

from __future__ import annotations

from pathlib import Path

from mlpmem_ds.core.files import FileRecord
from mlpmem_ds.core.objects import on_demand

RECORD = FileRecord(name="a", bytes=1, sha256="0" * 64)


def test_only_registered_directories_are_asked_for_their_files(tmp_path: Path) -> None:
    asked: list[FileRecord] = []
    on_demand.ensure(tmp_path, RECORD)
    on_demand.register(tmp_path, asked.append)
    assert on_demand.is_fetched_on_demand(tmp_path)
    on_demand.ensure(tmp_path, RECORD)
    on_demand.forget(tmp_path)
    on_demand.ensure(tmp_path, RECORD)
    assert asked == [RECORD] and not on_demand.is_fetched_on_demand(tmp_path)


def test_the_remedy_of_a_damaged_file_is_that_of_the_place_where_it_is(tmp_path: Path) -> None:
    root = tmp_path / "0123456789abcdef" / "run"
    step, other = root / "checkpoints" / "step-4", tmp_path / "mine" / "run"
    for folder in (step, other):
        folder.mkdir(parents=True)
    (root.parent / on_demand.SOURCE).write_text("{}")  # as another program's may be called
    (other.parent / on_demand.MARK).touch()  # not the cache's name
    for folder in (root, step, other):
        assert on_demand.remedy_of(folder, local="run it again") == "run it again"
    (root.parent / on_demand.MARK).touch()
    for folder in (root, step):
        remedy = on_demand.remedy_of(folder, local="run it again")
        assert "the same command again, which fetches it anew" in remedy
    assert on_demand.remedy_of(other, local="run it again") == "run it again"


def test_token_shards_and_target_shards_are_fetched_on_demand() -> None:
    corpus, targets = on_demand.PATTERNS["corpus"], on_demand.PATTERNS["targets"]
    for name in ("train/tokens-00000.bin", "test/answers-00000.bin"):
        assert on_demand.is_on_demand(name, corpus)
    for name in ("train/documents-00000.jsonl", "tokenizer/tokenizer.json", "manifest.json"):
        assert not on_demand.is_on_demand(name, corpus)
    for name in ("knn-000000000000-64.tar.zst", "0001/knn-000000000064-64.tar", "knn-0-1.tar.index.json"):
        assert on_demand.is_on_demand(name, targets)
    for name in ("frequency_order.npy", "done/knn-000000000000.json", "audit.json"):
        assert not on_demand.is_on_demand(name, targets)
