"""The cache: what it holds, what it drops and what it does not, and files that are fetched on demand."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core import files
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.objects import cache as cache_module
from mlpmem_ds.core.objects import on_demand
from mlpmem_ds.core.objects.cache import PLACE, SIZE, Cache
from mlpmem_ds.core.objects.contents import directories_in
from mlpmem_ds.core.objects.push import Push
from mlpmem_ds.core.objects.store import Store
from mlpmem_ds.core.temporaries import time_of_file_system
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus

from ..toy_stage import Config, result_of, run
from .conftest import CountingStore


def push(root: Path, url: str) -> int:
    """The bytes of its files."""
    Push(directories_in(root)[0], Store(url)).send()
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10**9)


@pytest.fixture
def held() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def stages(tmp_path: Path, url: str, count: int) -> tuple[list[str], int]:
    """URLs of stages of about the same size, and the size of the largest."""
    sizes = []
    for number in range(count):
        run(Config(output=tmp_path / f"stage{number}", factor=number + 1), World())
        sizes.append(push(tmp_path / f"stage{number}", f"{url}{number}/stage"))
    return [f"{url}{number}/stage" for number in range(count)], max(sizes)


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
    memory_url: str, stage_dir: Path, tmp_path: Path, cache: Cache, held: contextlib.ExitStack
) -> None:
    push(stage_dir, memory_url)
    root = cache.open(memory_url, held, flag="--keys")
    path = root / "part-1.npy"
    number = path.stat().st_ino
    assert cache.open(memory_url, held, flag="--keys") == root and path.stat().st_ino == number
    path.unlink()
    cache.open(memory_url, held, flag="--keys")
    assert result_of(root) == result_of(stage_dir)
    run(Config(output=tmp_path / "new", factor=3), World())
    Push(directories_in(tmp_path / "new")[0], Store(memory_url), replace=True).send()
    newer = cache.open(memory_url, held, flag="--keys")
    assert newer != root and result_of(newer) == result_of(tmp_path / "new")


def flip(path: Path) -> None:
    """One bit, as a disk does it: no time changes. What this process has compared is forgotten."""
    state = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    files._compared.clear()


@pytest.mark.parametrize("name", ["part-1.npy", "identity.json", "done/2.json", "manifest.json"])
def test_a_flipped_bit_is_fetched_again_by_the_next_command(
    memory_url: str, stage_dir: Path, cache: Cache, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    push(stage_dir, memory_url)
    with contextlib.ExitStack() as held:
        root = cache.open(memory_url, held, flag="--keys")
    flip(root / name)
    with contextlib.ExitStack() as held, caplog.at_level("WARNING"):
        cache.open(memory_url, held, flag="--keys")
    assert result_of(root) == result_of(stage_dir)
    assert f"{root / name} in the cache is damaged: fetching it again" in caplog.text


def test_the_reader_of_a_damaged_copy_is_told_to_give_the_same_command(
    memory_url: str, corpus_dir: Path, cache: Cache, held: contextlib.ExitStack
) -> None:
    push(corpus_dir, memory_url)
    root = cache.open(memory_url, held, flag="--corpus")
    flip(next((root / "tokenizer").iterdir()))
    with pytest.raises(DamagedDataError, match=r"checksum of its record: .* the same command again, which"):
        open_corpus(root, "test").check_files()


def test_ranks_that_wait_for_the_first_do_not_compare_again_and_later_ones_do(
    memory_url: str, stage_dir: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(stage_dir, memory_url)
    with contextlib.ExitStack() as held:
        home = cache.open(memory_url, held, flag="--keys").parent
    asked = time_of_file_system(home)
    os.utime(home / ".compared", (asked - 1, asked - 1))
    compared: list[Path] = []

    def not_whole(root: Path, records: list[files.FileRecord]) -> list[files.FileRecord]:
        compared.append(root)
        return []

    monkeypatch.setattr(cache_module, "not_whole", not_whole)
    with contextlib.ExitStack() as held:
        cache.open(memory_url, held, flag="--keys")
    assert len(compared) == 1
    os.utime(home / ".compared", (asked + 3600, asked + 3600))  # another's, while this one waited
    with contextlib.ExitStack() as held:
        cache.open(memory_url, held, flag="--keys")
    assert len(compared) == 1
    # This one looked at sizes only, which is nothing for those who asked since that other one.
    assert (home / ".compared").stat().st_mtime == pytest.approx(asked + 3600)


def test_a_flipped_bit_of_a_shard_is_fetched_again_when_it_is_read(
    memory_url: str, corpus_dir: Path, cache: Cache, held: contextlib.ExitStack
) -> None:
    push(corpus_dir, memory_url)
    root = cache.open(memory_url, held, flag="--corpus")
    corpus = open_corpus(root, "test")
    tokens = np.array(corpus.tokens(0, corpus.num_tokens))
    (shard,) = root.glob("test/tokens-*.bin")
    flip(shard)
    np.testing.assert_array_equal(open_corpus(root, "test").tokens(0, corpus.num_tokens), tokens)


def test_a_shard_that_is_dropped_while_it_is_compared_is_fetched_again(
    memory_url: str,
    corpus_dir: Path,
    cache: Cache,
    held: contextlib.ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push(corpus_dir, memory_url)
    root = cache.open(memory_url, held, flag="--corpus")
    corpus = open_corpus(root, "test")
    tokens = np.array(corpus.tokens(0, corpus.num_tokens))
    (shard,) = root.glob("test/tokens-*.bin")
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
    np.testing.assert_array_equal(open_corpus(root, "test").tokens(0, corpus.num_tokens), tokens)
    assert used and time.time() - used[0] < 600  # in use before it was compared
    assert shard.exists()


def test_what_interrupted_fetches_and_removals_have_left_is_dropped(
    memory_url: str, corpus_dir: Path, cache: Cache, held: contextlib.ExitStack
) -> None:
    """It would count as used for ever."""
    push(corpus_dir, memory_url)
    root = cache.open(memory_url, held, flag="--corpus")
    half = root / "train" / ".tokens-000.bin.0123456789ab.5000.partial"
    half.write_bytes(b"half")
    os.utime(half, (time.time() - 3600,) * 2)
    other = root / "train" / ".tokens-001.bin.0123456789ab.5000.partial"
    other.write_bytes(b"being fetched")
    for name in ("0" * 16, "1" * 16, ".mlpmem-dropped-7", "mine"):
        (cache.root / name / "keys").mkdir(parents=True)
    for name in ("0" * 16, "1" * 16, "mine"):
        (cache.root / name / on_demand.MARK).touch()
    (cache.root / "1111111111111111/source.json").write_text("{")  # damaged
    cache.max_bytes = cache.contents()[0].num_bytes + 100
    open_corpus(root, "test").tokens(0, 1)
    assert not half.exists() and other.exists()
    assert sorted(path.name for path in cache.root.iterdir()) == sorted([root.parent.name, "mine"])


def test_directories_of_others_are_not_touched_whatever_their_names(
    memory_url: str, tmp_path: Path, held: contextlib.ExitStack
) -> None:
    """Also those that another version of the cache, or a user's copy, would be."""
    (one, two), size = stages(tmp_path, memory_url, 2)
    cache = Cache(tmp_path / "shared", int(1.5 * size))
    with contextlib.ExitStack() as first:
        dropped = cache.open(one, first, flag="--keys").parent
    theirs = [
        "0" * 16 + "/.git/HEAD",
        "1" * 16 + "/data/thesis.tex",
        "2" * 16 + "/loose",
        "3" * 16 + "/.hidden",
    ]
    theirs += ["4" * 16 + "/source.json", "5" * 16 + "/source.json", "mine/source.json"]
    for name in theirs:
        (cache.root / name).parent.mkdir(parents=True)
        (cache.root / name).write_text("{}")
    for name in ("5" * 16, "mine"):
        (cache.root / name / on_demand.MARK).touch()
    files.publish_json(cache.root / "5555555555555555/source.json", {"version": 2}, seal=True)  # a newer one
    shutil.copy(dropped / "source.json", cache.root / "mine/source.json")
    linked = tmp_path / "elsewhere" / "6666666666666666"
    shutil.copytree(dropped, linked)
    (cache.root / linked.name).symlink_to(linked)
    cache.open(two, held, flag="--keys")
    assert not dropped.exists()
    assert all((cache.root / name).is_file() for name in theirs)
    assert (cache.root / linked.name / "source.json").is_file()
    assert not list(cache.root.glob(".mlpmem-dropped-*"))


def test_ranks_of_a_machine_fetch_a_directory_once(
    memory_url: str,
    stage_dir: Path,
    cache: Cache,
    held: contextlib.ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push(stage_dir, memory_url)
    stores: list[CountingStore] = []

    def counting(url: str) -> CountingStore:
        stores.append(CountingStore(url))
        return stores[-1]

    monkeypatch.setattr(cache_module, "Store", counting)
    with ThreadPoolExecutor(4) as pool:
        roots = list(pool.map(lambda _: cache.open(memory_url, held, flag="--keys"), range(4)))
    assert len(set(roots)) == 1 and result_of(roots[0]) == result_of(stage_dir)
    names = [name for store in stores for name in store.read_names if not name.startswith(".mirror/")]
    assert len(names) == len(set(names)) == 14


def test_what_was_used_longest_ago_is_dropped_and_nothing_in_use(
    memory_url: str, tmp_path: Path, held: contextlib.ExitStack
) -> None:
    (one, two, three), size = stages(tmp_path, memory_url, 3)
    cache = Cache(tmp_path / "cache", int(2.5 * size))
    with contextlib.ExitStack() as first:
        root = cache.open(one, first, flag="--keys")
    cache.open(two, held, flag="--keys")
    os.utime(root.parent / "source.json", (0, 0))
    cache.open(three, held, flag="--keys")
    assert not root.exists()
    assert [content.source.url for content in cache.contents()] == [three, two]
    with pytest.raises(UserError, match=rf"{one} needs .* MB|bytes in the cache .*set {SIZE} higher"):
        cache.open(one, held, flag="--keys")
    assert [content.source.url for content in cache.contents()] == [three, two]


def test_what_another_live_process_uses_is_not_dropped(tmp_path: Path, held: contextlib.ExitStack) -> None:
    """Until that process is killed."""
    (one, two), size = stages(tmp_path, f"file://{tmp_path}/store", 2)
    code = (
        "import contextlib, sys, time\n"
        "from pathlib import Path\n"
        "from mlpmem_ds.core.objects.cache import Cache\n"
        "held = contextlib.ExitStack()\n"
        f"Cache(Path({str(tmp_path / 'cache')!r}), {int(1.5 * size)}).open({one!r}, held, flag='--keys')\n"
        "print('open', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        cache = Cache(tmp_path / "cache", int(1.5 * size))
        assert [content.is_in_use for content in cache.contents()] == [True]
        with pytest.raises(UserError, match="in use"):
            cache.open(two, held, flag="--keys")
        process.kill()
        process.wait()
        cache.open(two, held, flag="--keys")
    assert [content.source.url for content in cache.contents()] == [two]


def test_a_container_that_is_gone_uses_nothing(
    memory_url: str, tmp_path: Path, held: contextlib.ExitStack
) -> None:
    """No process of this machine can ask whether it lives: its claim is no longer touched."""
    (one, two), size = stages(tmp_path, memory_url, 2)
    cache = Cache(tmp_path / "cache", int(1.5 * size))
    with contextlib.ExitStack() as first:
        root = cache.open(one, first, flag="--keys")
    left = root.parent / ".use-container-7.claim"
    left.write_text("container boot 7")
    with pytest.raises(UserError, match="in use"):
        cache.open(two, held, flag="--keys")
    os.utime(left, (time.time() - 7200,) * 2)
    cache.open(two, held, flag="--keys")
    assert not root.exists()


def test_what_another_process_drops_in_this_moment_is_passed_over(
    memory_url: str, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one, two), _ = stages(tmp_path, memory_url, 2)
    with contextlib.ExitStack() as held:
        roots = [cache.open(url, held, flag="--keys") for url in (one, two)]
    source_of = cache_module._source_of

    def and_drop(home: Path) -> cache_module.Source | None:
        source = source_of(home)
        if home == roots[0].parent:
            shutil.rmtree(home)
        return source

    monkeypatch.setattr(cache_module, "_source_of", and_drop)
    assert [content.source.url for content in cache.contents()] == [two]


def test_a_changed_object_is_refused_with_its_name(
    memory_url: str, stage_dir: Path, cache: Cache, held: contextlib.ExitStack
) -> None:
    push(stage_dir, memory_url)
    Store(memory_url).write("part-1.npy", b"short")
    with pytest.raises(DamagedDataError, match=f"{memory_url}/part-1.npy is cut short"):
        cache.open(memory_url, held, flag="--keys")
    with pytest.raises(UserError, match=f"--keys {memory_url}/none holds no mirror"):
        cache.open(f"{memory_url}/none", held, flag="--keys")


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


def test_shards_not_read_for_long_are_dropped_from_a_directory_in_use(
    memory_url: str, corpus_dir: Path, tmp_path: Path, cache: Cache, held: contextlib.ExitStack
) -> None:
    push(corpus_dir, memory_url)
    root = cache.open(memory_url, held, flag="--corpus")
    corpus = open_corpus(root, "train")
    tokens = corpus.tokens(0, corpus.num_tokens)
    (shard, *_) = root.glob("train/tokens-*.bin")
    open_corpus(root, "test").tokens(0, 1)
    (other,) = root.glob("test/tokens-*.bin")
    os.utime(shard, (time.time() - 3600, time.time() - 3600))
    cache.max_bytes = cache.contents()[0].num_bytes + 100
    open_corpus(root, "tuning").tokens(0, 1)
    assert not shard.exists() and other.exists()
    cache.max_bytes = 10**9
    np.testing.assert_array_equal(corpus.tokens(0, corpus.num_tokens), tokens)  # fetched again


def test_a_shard_that_is_read_while_others_are_dropped_is_kept(
    memory_url: str,
    corpus_dir: Path,
    cache: Cache,
    held: contextlib.ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push(corpus_dir, memory_url)
    root = cache.open(memory_url, held, flag="--corpus")
    for split in ("train", "test"):
        open_corpus(root, split).tokens(0, 1)
    (dropped,), (read,) = root.glob("train/tokens-*.bin"), root.glob("test/tokens-*.bin")
    os.utime(dropped, (0, 0))
    os.utime(read, (1, 1))
    remove = cache_module._remove

    def and_read(path: Path) -> None:
        remove(path)
        os.utime(read, (time.time() + 1, 1))

    monkeypatch.setattr(cache_module, "_remove", and_read)
    with pytest.raises(UserError, match="in use"), cache._room_for(cache.max_bytes, what="all"):
        pass
    assert not dropped.exists() and read.exists()


def test_a_missing_shard_is_refused_with_its_name(
    memory_url: str, corpus_dir: Path, cache: Cache, held: contextlib.ExitStack
) -> None:
    push(corpus_dir, memory_url)
    root = cache.open(memory_url, held, flag="--corpus")
    store = Store(memory_url)
    (name,) = (name for name in store.sizes("test") if "tokens-" in name)
    store.remove(name)
    with pytest.raises(DamagedDataError, match=f"{memory_url}/{name} is missing"):
        open_corpus(root, "test").tokens(0, 1)


def test_half_a_fetch_is_gone_on_with(memory_url: str, stage_dir: Path, cache: Cache) -> None:
    push(stage_dir, memory_url)
    content = Store(memory_url).read("part-4.npy")
    assert content is not None
    Store(memory_url).remove("part-4.npy")
    with contextlib.ExitStack() as held, pytest.raises(DamagedDataError):
        cache.open(memory_url, held, flag="--keys")
    (half,) = cache.contents()
    assert not half.is_in_use
    Store(memory_url).write("part-4.npy", content)
    with contextlib.ExitStack() as held:
        assert result_of(cache.open(memory_url, held, flag="--keys")) == result_of(stage_dir)


def test_place_and_size_are_from_the_environment(tmp_path: Path) -> None:
    cache = Cache.from_environment({PLACE: str(tmp_path), SIZE: "2e9"})
    assert (cache.root, cache.max_bytes) == (tmp_path, 2 * 10**9)
    assert Cache.from_environment({"XDG_CACHE_HOME": "/c"}).root == Path("/c/mlpmem-ds")
    with pytest.raises(UserError, match=f"{SIZE}=much is no number of bytes"):
        Cache.from_environment({SIZE: "much"})
    assert cache.contents() == []
