"""URLs of every kind that can be opened here, a toy stage's directory, a cache, and stores that count."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpmem_ds.core import files
from mlpmem_ds.core.files import publish_json, record_file
from mlpmem_ds.core.objects.cache import Cache
from mlpmem_ds.core.objects.contents import directories_in
from mlpmem_ds.core.objects.push import Push
from mlpmem_ds.core.objects.store import Store
from mlpmem_ds.core.world import World

from ...object_store import BUCKET, KEYS, gs_environment, gs_server, s3_server
from ..toy_stage import Config, run


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    yield from s3_server()


@pytest.fixture
def s3_url(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3_address}.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/run"


@pytest.fixture(scope="session")
def gs_address() -> Iterator[str]:
    yield from gs_server()


@pytest.fixture
def gs_url(gs_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in gs_environment(gs_address).items():
        monkeypatch.setenv(name, value)
    return f"gs://{BUCKET}/{uuid.uuid4().hex}/run"


@pytest.fixture(params=["memory", "file", "s3", "gs"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where nothing is yet."""
    if request.param in ("s3", "gs"):
        found: str = request.getfixturevalue(f"{request.param}_url")
        return found
    return f"memory://{uuid.uuid4().hex}/run" if request.param == "memory" else f"file://{tmp_path}/store/run"


@pytest.fixture
def memory_url() -> str:
    return f"memory://{uuid.uuid4().hex}/run"


@pytest.fixture
def stage_dir(tmp_path: Path) -> Path:
    """A complete directory of the toy stage: five units."""
    run(Config(output=tmp_path / "stage"), World())
    return tmp_path / "stage"


LISTS = {
    "export": ("mlpmem_export.json", "mlpmem-export"),
    "checkpoint": ("manifest.json", "mlpmem-checkpoint"),
}
"""kind → the name and the format of its list of files"""


def small_directory(root: Path, kind: str, content: str = "content") -> Path:
    """Three files of this content: an export, a checkpoint, or a model of another program."""
    root.mkdir()
    for number in range(3):
        (root / f"part-{number}.npy").write_text(f"{content} {number}")
    if kind in LISTS:
        name, format_name = LISTS[kind]
        files = [record_file(root, path.name).to_json() for path in sorted(root.iterdir())]
        publish_json(root / name, {"format": format_name, "files": files}, seal=True)
    return root


def push(root: Path, url: str) -> int:
    """The bytes of its files."""
    Push(directories_in(root)[0], Store(url)).send()
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    """One bit, as a disk does it: no time changes. What this process has compared is forgotten."""
    state = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    files._compared.clear()


def stages(tmp_path: Path, url: str, count: int) -> tuple[list[str], int]:
    """URLs of stages of about the same size, and the size of the largest."""
    sizes = []
    for number in range(count):
        run(Config(output=tmp_path / f"stage{number}", factor=number + 1), World())
        sizes.append(push(tmp_path / f"stage{number}", f"{url}{number}/stage"))
    return [f"{url}{number}/stage" for number in range(count)], max(sizes)


@pytest.fixture
def stage_url(memory_url: str, stage_dir: Path) -> str:
    """Of the mirror of `stage_dir`."""
    push(stage_dir, memory_url)
    return memory_url


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10**9)


@pytest.fixture
def held() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def corpus_copy(memory_url: str, corpus_dir: Path, cache: Cache, held: contextlib.ExitStack) -> Path:
    """The corpus, mirrored to `memory_url` and opened by the cache."""
    push(corpus_dir, memory_url)
    return cache.open(memory_url, held, flag="--corpus")


class CountingStore(Store):
    """Keeps the names of what is written and read, and fails at the object `fails_at`."""

    def __init__(self, url: str, *, fails_at: str | None = None) -> None:
        super().__init__(url)
        self.fails_at = fails_at
        self.written: list[str] = []
        self.read_names: list[str] = []

    def write(self, name: str, content: bytes) -> None:
        if name == self.fails_at:
            raise KeyboardInterrupt
        super().write(name, content)
        self.written.append(name)

    def read(self, name: str) -> bytes | None:
        if name == self.fails_at:
            raise KeyboardInterrupt
        self.read_names.append(name)
        return super().read(name)
