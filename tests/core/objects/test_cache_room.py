"""Room in the cache: what is dropped, in which order, and what never is."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core import files
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.objects import cache as cache_module
from mlpmem_ds.core.objects import on_demand
from mlpmem_ds.core.objects.cache import SIZE, Cache
from mlpmem_ds.core.objects.fetch import partial_path
from mlpmem_ds.core.objects.store import Store
from mlpmem_ds.formats.corpus import open_corpus

from .conftest import flip, push, stages

FILES = tuple(f"file-{number}" for number in range(5))
FILE_BYTES = 10_000
SLACK_BYTES = 2_000
"""for what the cache writes next to the files of a mirror, such as claims"""


@pytest.fixture
def files_url(memory_url: str, tmp_path: Path) -> str:
    """Of five files of the same size."""
    root = tmp_path / "mirrored" / "files"
    root.mkdir(parents=True)
    for number, name in enumerate(FILES):
        (root / name).write_bytes(bytes([number]) * FILE_BYTES)
    push(root, memory_url)
    return memory_url


class Interrupted(Store):
    """Gives the list of a mirror and its first file."""

    def read(self, name: str) -> bytes | None:
        if name in FILES[1:]:
            raise KeyboardInterrupt
        return super().read(name)


def interrupt(url: str, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        monkeypatch.context() as patch,
        contextlib.ExitStack() as held,
        pytest.raises(KeyboardInterrupt),
    ):
        patch.setattr(cache_module, "Store", Interrupted)
        cache.open(url, held, flag="--keys")


def test_an_interrupted_fetch_that_fits_is_gone_on_with(
    files_url: str,
    tmp_path: Path,
    held: contextlib.ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was reserved for it, and halves of its files, are not counted once more."""
    cache = Cache(tmp_path / "cache", len(FILES) * FILE_BYTES + SLACK_BYTES)
    interrupt(files_url, cache, monkeypatch)
    root = cache.open(files_url, held, flag="--keys")
    assert [(root / name).stat().st_size for name in FILES] == [FILE_BYTES] * len(FILES)


def test_an_interrupted_fetch_that_does_not_fit_is_refused_with_what_others_have(
    files_url: str, tmp_path: Path, held: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache", len(FILES) * FILE_BYTES + SLACK_BYTES)
    interrupt(files_url, cache, monkeypatch)
    cache.max_bytes = (len(FILES) - 1) * FILE_BYTES
    with pytest.raises(
        UserError, match=rf"needs 0.04 MB in .* may hold 0.04 MB and has 0.01 MB .*set {SIZE}"
    ):
        cache.open(files_url, held, flag="--keys")


@pytest.mark.parametrize("damage", ["removed", "flipped"])
def test_a_damaged_directory_that_fits_is_mended(
    files_url: str, tmp_path: Path, held: contextlib.ExitStack, damage: str
) -> None:
    cache = Cache(tmp_path / "cache", len(FILES) * FILE_BYTES + SLACK_BYTES)
    with contextlib.ExitStack() as first:
        root = cache.open(files_url, first, flag="--keys")
    for name in FILES:
        if damage == "removed":
            (root / name).unlink()
        else:
            flip(root / name)
    cache.open(files_url, held, flag="--keys")
    assert [(root / name).read_bytes()[-1] for name in FILES] == list(range(len(FILES)))


@pytest.mark.parametrize("left", ["half", "old half", "damaged"])
def test_a_shard_of_which_something_is_left_needs_room_once(
    corpus_copy: Path, cache: Cache, caplog: pytest.LogCaptureFixture, left: str
) -> None:
    """Nor is what is left dropped for it: it is gone on with."""
    corpus = open_corpus(corpus_copy, "test")
    tokens = np.array(corpus.tokens(0, corpus.num_tokens))
    (shard,) = corpus_copy.glob("test/tokens-*.bin")
    if left == "damaged":
        flip(shard)
    else:
        half = partial_path(shard, files.record_file(shard.parent, shard.name))
        half.write_bytes(shard.read_bytes()[:10])
        shard.unlink()
        if left == "old half":
            os.utime(half, (time.time() - 3600,) * 2)
    cache.max_bytes = cache.contents()[0].num_bytes + 100
    with caplog.at_level("INFO"):
        np.testing.assert_array_equal(open_corpus(corpus_copy, "test").tokens(0, corpus.num_tokens), tokens)
    assert "dropping" not in caplog.text


def test_what_an_interrupted_fetch_has_left_needs_no_more_of_the_disk(
    files_url: str, tmp_path: Path, held: contextlib.ExitStack, set_free_bytes: Callable[[int], None]
) -> None:
    cache = Cache(tmp_path / "cache", 10**9)
    with contextlib.ExitStack() as first:
        root = cache.open(files_url, first, flag="--keys")
    for name in FILES[1:]:
        os.replace(root / name, partial_path(root / name, files.record_file(root, name)))
    partial_path(root / FILES[1], files.record_file(tmp_path / "mirrored/files", FILES[1])).write_bytes(b"1")
    set_free_bytes(FILE_BYTES - 2)
    with pytest.raises(UserError, match=r"need 9999 bytes, and .* has 9998 bytes free"):
        cache.open(files_url, held, flag="--keys")
    set_free_bytes(FILE_BYTES - 1)
    cache.open(files_url, held, flag="--keys")


def test_what_interrupted_fetches_and_removals_have_left_is_dropped(corpus_copy: Path, cache: Cache) -> None:
    """It would count as used for ever."""
    half = corpus_copy / "train" / ".tokens-000.bin.0123456789ab.5000.partial"
    half.write_bytes(b"half")
    os.utime(half, (time.time() - 3600,) * 2)
    other = corpus_copy / "train" / ".tokens-001.bin.0123456789ab.5000.partial"
    other.write_bytes(b"being fetched")
    for name in ("0" * 16, "1" * 16, ".mlpmem-dropped-7", "mine"):
        (cache.root / name / "keys").mkdir(parents=True)
    for name in ("0" * 16, "1" * 16, "mine"):
        (cache.root / name / on_demand.MARK).touch()
    (cache.root / "1111111111111111/source.json").write_text("{")  # damaged
    cache.max_bytes = cache.contents()[0].num_bytes + 100
    open_corpus(corpus_copy, "test").tokens(0, 1)
    assert not half.exists() and other.exists()
    assert sorted(path.name for path in cache.root.iterdir()) == sorted([corpus_copy.parent.name, "mine"])


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


def test_shards_not_read_for_long_are_dropped_from_a_directory_in_use(
    corpus_copy: Path, cache: Cache
) -> None:
    corpus = open_corpus(corpus_copy, "train")
    tokens = corpus.tokens(0, corpus.num_tokens)
    (shard, *_) = corpus_copy.glob("train/tokens-*.bin")
    open_corpus(corpus_copy, "test").tokens(0, 1)
    (other,) = corpus_copy.glob("test/tokens-*.bin")
    os.utime(shard, (time.time() - 3600, time.time() - 3600))
    cache.max_bytes = cache.contents()[0].num_bytes + 100
    open_corpus(corpus_copy, "tuning").tokens(0, 1)
    assert not shard.exists() and other.exists()
    cache.max_bytes = 10**9
    np.testing.assert_array_equal(corpus.tokens(0, corpus.num_tokens), tokens)  # fetched again


def test_a_shard_that_is_read_while_others_are_dropped_is_kept(
    corpus_copy: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "test"):
        open_corpus(corpus_copy, split).tokens(0, 1)
    (dropped,), (read,) = corpus_copy.glob("train/tokens-*.bin"), corpus_copy.glob("test/tokens-*.bin")
    os.utime(dropped, (0, 0))
    os.utime(read, (1, 1))
    remove = cache_module._remove

    def and_read(path: Path) -> None:
        remove(path)
        os.utime(read, (time.time() + 1, 1))

    monkeypatch.setattr(cache_module, "_remove", and_read)
    all_room = files.FileRecord(name="all", bytes=cache.max_bytes, sha256="0" * 64)
    with pytest.raises(UserError, match="in use"), cache._room_for([all_room], corpus_copy, what="all"):
        pass
    assert not dropped.exists() and read.exists()


@pytest.mark.parametrize("place", ["", "/directory/keys.npy", "/.."])
def test_a_place_that_no_flag_has_named_is_explained(
    stage_url: str,
    cache: Cache,
    held: contextlib.ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """The cache lies in the home directory by default, which is full or cannot be written."""
    name = os.path.normpath(f"{cache.root}{place}")

    def refuse(number: int, name: str) -> None:
        raise OSError(number, os.strerror(number), name)

    monkeypatch.setattr(cache_module, "publish_json", lambda *_, **__: refuse(errno.EDQUOT, name))
    with pytest.raises(UserError, match=f"quota exceeded: {name}, in the cache .*set MLPMEM_CACHE to a"):
        cache.open(stage_url, held, flag="--keys")
    monkeypatch.setattr(cache_module, "publish_json", lambda *_, **__: refuse(errno.ENOSPC, "/elsewhere"))
    with pytest.raises(OSError, match="No space left.*/elsewhere") as caught:
        cache.open(stage_url, held, flag="--keys")
    assert not isinstance(caught.value, UserError)
