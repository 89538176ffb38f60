"""Shards streamed by webdataset: from local paths, `pipe:` commands, http(s) and other URLs that it opens.

Part of `train --loader webdataset`; the one file that uses webdataset. It opens URLs, reads tars, groups
members to samples and shuffles; what a shard is, and what its samples mean, is in formats/.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, TypeVar, cast

import webdataset

from mlpmem_ds.core.errors import DamagedDataError

Item = TypeVar("Item")
Unpack = Callable[[BinaryIO], BinaryIO]
_READ_BYTES = 1 << 20
_SECONDS_TO_END = 1.0  # for a command whose bytes are at their end
_REASONS_OF_CURL = {
    6: "the host's name is not known",
    7: "the server takes no connection",
    18: "the connection ended before the file did",
    22: "the server answered with an error, such as 404 (not there) or 403 (not allowed)",
    28: "the server was silent for too long",
    35: "no TLS connection could be made",
    56: "the connection broke",
    60: "the server's certificate is not accepted",
}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard to stream, and what it must be."""

    url: str
    num_bytes: int
    sha256: str


def url_of(place: str, name: str) -> str:
    """The URL of a file: `place` with the name for `{}`, or with a slash and the name behind it."""
    return place.replace("{}", name) if "{}" in place else f"{place.rstrip('/')}/{name}"


def read_shard(shard: Shard, *, unpack: Unpack) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members by the rest of their names) of each sample of a shard, in order.

    Args:
        shard: is read once, to its end, and compared with its checksum there.
        unpack: the stream of the stored bytes → that of a tar.

    Raises:
        DamagedDataError: it cannot be opened or read, or is not what it must be; samples before that were
            given out.
    """
    streams: list[_CheckedStream] = []

    def opened(sources: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for source in webdataset.tariterators.url_opener(sources):
            streams.append(_CheckedStream(source["stream"]))
            yield {**source, "stream": unpack(cast(BinaryIO, streams[-1]))}

    pipeline = webdataset.DataPipeline(
        lambda: iter([{"url": shard.url}]),
        opened,
        webdataset.tariterators.tar_file_expander,
        webdataset.tariterators.group_by_keys,
    )
    try:
        for sample in pipeline:
            yield (
                sample["__key__"],
                {name: content for name, content in sample.items() if not name.startswith("__")},
            )
        fault = streams[0].fault(shard)
    except GeneratorExit:
        raise
    except Exception as error:  # each handler of webdataset's has its own kinds
        raise DamagedDataError(
            f"{shard.url} could not be streamed ({_reason(error, shard.url, streams)}): check that it is"
            " there and whole; the same command continues from the newest checkpoint"
        ) from error
    finally:
        for stream in streams:
            stream.close()
    if fault is not None:
        raise DamagedDataError(f"{shard.url} {fault}: upload it again, or run write_targets again")


class _CheckedStream(io.RawIOBase):
    """A stream of stored bytes, counted and hashed as they pass."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream, self._hash, self._num_bytes = stream, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self._hash.update(content)
        self._num_bytes += len(content)
        return len(content)

    def fault(self, shard: Shard) -> str | None:
        """Read what is behind the tar's end, and say in what it is not the shard, or None."""
        while self.read(_READ_BYTES):
            pass
        if self._num_bytes != shard.num_bytes:
            return f"has {self._num_bytes:,} bytes where {shard.num_bytes:,} were written"
        return (
            None if self._hash.hexdigest() == shard.sha256 else "does not have the checksum of its manifest"
        )

    def exit_code(self) -> int | None:
        """Of the command that gives the bytes; None where there is none, or it has not ended."""
        process = getattr(self._stream, "proc", None)
        if process is None:
            return None
        try:
            return int(process.wait(_SECONDS_TO_END))
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        if not self.closed:
            super().close()
            with contextlib.suppress(OSError):  # a command that was left early; what was read is checked
                self._stream.close()


def _reason(error: Exception, url: str, streams: list[_CheckedStream]) -> str:
    """In words: webdataset's errors hold the objects and the command line that it worked with."""
    code = streams[0].exit_code() if streams else None
    if code and not url.startswith("pipe:"):
        meaning = _REASONS_OF_CURL.get(code)
        return f"{meaning}; exit code {code} of curl" if meaning else f"exit code {code} of what reads it"
    if code:
        return f"the command ended with exit code {code}"
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    said = str(error.args[0]) if error.args else ""
    return f"{type(error).__name__}: {said.partition(' @ <')[0]}"


def shuffled(items: Iterator[Item], *, buffer: int, seed: int) -> Iterator[Item]:
    """The items through a buffer of so many, one at random out for each that comes in."""
    stage = partial(webdataset.filters._shuffle, bufsize=buffer, initial=buffer, rng=random.Random(seed))
    return iter(webdataset.DataPipeline(lambda: items, stage))
