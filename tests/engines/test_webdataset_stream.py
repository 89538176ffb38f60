"""Shards streamed by webdataset: real tars from a path, a command and an HTTP server; and broken ones."""

from __future__ import annotations

import functools
import hashlib
import io
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import zstandard

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.engines.webdataset_stream import Shard, read_shard, shuffled, url_of

SAMPLES = {f"{number:012d}": {"a.npy": bytes([number]) * 5000, "meta.json": b"{}"} for number in range(4)}


def tar_of(samples: dict[str, dict[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for key, members in samples.items():
            for name, content in members.items():
                header = tarfile.TarInfo(f"{key}.{name}")
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    (root / "one.tar").write_bytes(tar_of(SAMPLES))
    (root / "one.tar.zst").write_bytes(zstandard.compress(tar_of(SAMPLES)))
    return root


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(place))) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()
        thread.join()


def shard_at(place: Path, url: str, name: str = "one.tar") -> Shard:
    content = (place / name).read_bytes()
    return Shard(url=url, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def as_it_is(stream: Any) -> Any:
    return stream


@pytest.mark.parametrize("kind", ["path", "file", "pipe", "http"])
def test_samples_come_in_order_from_anywhere(place: Path, server: str, kind: str) -> None:
    if kind == "http" and not shutil.which("curl"):
        pytest.skip("webdataset reads http with curl, which is not on this machine")
    where = {"path": str(place), "file": f"file:{place}", "pipe": f"pipe:cat {place}/{{}}", "http": server}[
        kind
    ]
    shard = shard_at(place, url_of(where, "one.tar"))
    assert dict(read_shard(shard, unpack=as_it_is)) == SAMPLES
    assert list(dict(read_shard(shard, unpack=as_it_is))) == list(SAMPLES)


def test_stored_bytes_are_unpacked_and_checked(place: Path) -> None:
    shard = shard_at(place, str(place / "one.tar.zst"), "one.tar.zst")

    def unpack(stream: Any) -> Any:
        return zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)

    assert dict(read_shard(shard, unpack=unpack)) == SAMPLES


def test_names_go_into_a_place() -> None:
    assert url_of("/data/targets/", "0001/a.tar") == "/data/targets/0001/a.tar"
    assert url_of("http://host/x", "a") == "http://host/x/a"
    assert url_of("pipe:aws s3 cp s3://b/{} -", "a") == "pipe:aws s3 cp s3://b/a -"


def test_what_is_not_the_shard_is_refused(place: Path, server: str, tmp_path: Path) -> None:
    content = (place / "one.tar").read_bytes()
    other = bytearray(content)
    other[600] ^= 1  # in a member's content
    files = {
        "cut.tar": content[: len(content) // 2],
        "other.tar": bytes(other),
        "long.tar": content + b"1234",
    }
    for name, found in files.items():
        (tmp_path / name).write_bytes(found)
    shard = shard_at(place, "")
    for url, said in {
        str(tmp_path / "cut.tar"): "could not be streamed|bytes where",
        str(tmp_path / "other.tar"): "does not have the checksum",
        str(tmp_path / "long.tar"): "bytes where",
        str(tmp_path / "none.tar"): "could not be streamed .*FileNotFound",
        "pipe:exit 3": r"could not be streamed \(the command ended with exit code 3\)",
        f"pipe:head -c 3000 {place}/one.tar; exit 1": "could not be streamed",
        f"{server}/none.tar": r"none.tar could not be streamed \(the server answered with.*of curl\)",
        "nothing://x/y": r"could not be streamed \(ValueError: nothing://x/y: no gopen handler defined\)",
        str(place): r"could not be streamed \(IsADirectoryError: Is a directory\)",
    }.items():
        with pytest.raises(DamagedDataError, match=said) as raised:
            list(read_shard(Shard(url=url, num_bytes=shard.num_bytes, sha256=shard.sha256), unpack=as_it_is))
        assert not any(odd in str(raised.value) for odd in ("'", "object at", "bufsize")), raised.value


def test_a_reader_that_leaves_early_closes_its_stream(place: Path) -> None:
    stream = read_shard(shard_at(place, f"pipe:cat {place}/one.tar; sleep 0"), unpack=as_it_is)
    assert next(stream)[0] == "000000000000"
    stream.close()  # type: ignore[attr-defined]


def test_a_shuffle_buffer_mixes_and_loses_nothing() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    found = []
    for item in shuffled(items(), buffer=100, seed=1):
        found.append(item)
        assert len(taken) <= len(found) + 101  # bounded memory
    assert sorted(found) == list(range(1000)) and found != sorted(found)
    assert found == list(shuffled(iter(range(1000)), buffer=100, seed=1))
    assert found != list(shuffled(iter(range(1000)), buffer=100, seed=2))
    assert list(shuffled(iter(range(5)), buffer=1, seed=1)) == [0, 1, 2, 3, 4]
