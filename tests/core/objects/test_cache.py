"""The cache: a URL becomes a local directory, fetched once, and by parts where that is enough."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.objects import cache as cache_module
from mlpmem_ds.core.objects import on_demand
from mlpmem_ds.core.objects.cache import PLACE, SIZE, Cache
from mlpmem_ds.core.objects.contents import directories_in
from mlpmem_ds.core.objects.push import Push
from mlpmem_ds.core.objects.store import Store
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus

from ..toy_stage import Config, result_of, run
from .conftest import CountingStore, push


def test_a_url_is_a_local_directory_of_its_name_and_bytes(
    url: str, stage_dir: Path, cache: Cache, held: contextlib.ExitStack
) -> None:
    size = push(stage_dir, url)
    root = cache.open(url, held, flag="--keys")
    assert root.name == "run" and result_of(root) == result_of(stage_dir)
    (content,) = cache.contents()
    assert content.source.url == url and content.is_in_use
    assert content.num_bytes >= size and content.source.num_files == 14
    again = cache.open(url, held, flag="--keys")
    assert again == root


def test_what_is_there_is_not_fetched_again_and_a_new_mirror_is(
    stage_url: str, stage_dir: Path, tmp_path: Path, cache: Cache, held: contextlib.ExitStack
) -> None:
    root = cache.open(stage_url, held, flag="--keys")
    path = root / "part-1.npy"
    number = path.stat().st_ino
    assert cache.open(stage_url, held, flag="--keys") == root and path.stat().st_ino == number
    path.unlink()
    cache.open(stage_url, held, flag="--keys")
    assert result_of(root) == result_of(stage_dir)
    run(Config(output=tmp_path / "new", factor=3), World())
    Push(directories_in(tmp_path / "new")[0], Store(stage_url), replace=True).send()
    newer = cache.open(stage_url, held, flag="--keys")
    assert newer != root and result_of(newer) == result_of(tmp_path / "new")


def test_two_urls_of_the_same_content_share_one_directory(
    memory_url: str, stage_dir: Path, cache: Cache, held: contextlib.ExitStack
) -> None:
    """Also where their last parts differ, which name it."""
    urls = [f"{memory_url}/{name}" for name in ("keys", "copy", "keys")]
    for url in urls[:2]:
        push(stage_dir, url)
    roots = [cache.open(url, held, flag="--keys") for url in urls]
    assert len(set(roots)) == 1 and roots[0].name == "keys" and result_of(roots[0]) == result_of(stage_dir)
    (content,) = cache.contents()
    assert [path.name for path in content.home.iterdir() if path.is_dir()] == ["keys"]


def test_a_url_that_ends_above_names_no_directory_there(
    stage_dir: Path, tmp_path: Path, cache: Cache, held: contextlib.ExitStack
) -> None:
    push(stage_dir, f"file://{tmp_path}/store")
    root = cache.open(f"file://{tmp_path}/store/done/..", held, flag="--keys")
    assert root.parent == cache.contents()[0].home and root.name == "file"


def test_ranks_of_a_machine_fetch_a_directory_once(
    stage_url: str, stage_dir: Path, cache: Cache, held: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores: list[CountingStore] = []

    def counting(url: str) -> CountingStore:
        stores.append(CountingStore(url))
        return stores[-1]

    monkeypatch.setattr(cache_module, "Store", counting)
    with ThreadPoolExecutor(4) as pool:
        roots = list(pool.map(lambda _: cache.open(stage_url, held, flag="--keys"), range(4)))
    assert len(set(roots)) == 1 and result_of(roots[0]) == result_of(stage_dir)
    names = [name for store in stores for name in store.read_names if not name.startswith(".mirror/")]
    assert len(names) == len(set(names)) == 14


def test_token_shards_are_fetched_when_they_are_read(
    url: str, corpus_dir: Path, cache: Cache, held: contextlib.ExitStack
) -> None:
    push(corpus_dir, url)
    root = cache.open(url, held, flag="--corpus")
    assert not list(root.glob("*/tokens-*.bin")) and (root / "tokenizer").is_dir()
    local, cached = open_corpus(corpus_dir, "test"), open_corpus(root, "test")
    assert cached.sha256 == local.sha256
    np.testing.assert_array_equal(cached.tokens(0, cached.num_tokens), local.tokens(0, local.num_tokens))
    assert list(root.glob("test/tokens-*.bin")) and not list(root.glob("train/tokens-*.bin"))
    held.close()
    assert not on_demand.is_fetched_on_demand(root)


def test_half_a_fetch_is_gone_on_with(stage_url: str, stage_dir: Path, cache: Cache) -> None:
    content = Store(stage_url).read("part-4.npy")
    assert content is not None
    Store(stage_url).remove("part-4.npy")
    with contextlib.ExitStack() as held, pytest.raises(DamagedDataError):
        cache.open(stage_url, held, flag="--keys")
    (half,) = cache.contents()
    assert not half.is_in_use
    Store(stage_url).write("part-4.npy", content)
    with contextlib.ExitStack() as held:
        assert result_of(cache.open(stage_url, held, flag="--keys")) == result_of(stage_dir)


@pytest.mark.parametrize("content", ['{"format": "corpus"}', "// no JSON"])
def test_an_identity_of_another_program_is_a_file_as_any_other(
    memory_url: str, tmp_path: Path, cache: Cache, held: contextlib.ExitStack, content: str
) -> None:
    """It does not say which files are fetched on demand."""
    root = tmp_path / "model"
    (root / "train").mkdir(parents=True)
    for name in ("identity.json", "manifest.json", "train/tokens-0.bin"):
        (root / name).write_text(content)
    push(root, memory_url)
    copy = cache.open(memory_url, held, flag="--base")
    assert not on_demand.is_fetched_on_demand(copy)
    for name in ("identity.json", "manifest.json", "train/tokens-0.bin"):
        assert (copy / name).read_text() == content


def test_place_and_size_are_from_the_environment(tmp_path: Path) -> None:
    cache = Cache.from_environment({PLACE: str(tmp_path), SIZE: "2e9"})
    assert (cache.root, cache.max_bytes) == (tmp_path, 2 * 10**9)
    assert Cache.from_environment({"XDG_CACHE_HOME": "/c"}).root == Path("/c/mlpmem-ds")
    with pytest.raises(UserError, match=f"{SIZE}=much is no number of bytes"):
        Cache.from_environment({SIZE: "much"})
    assert cache.contents() == []
