"""Samples of target rows ↔ shard files, in two containers, each with an index of its samples next to it. See
README.md.

tar.zst   multi-frame zstd: each sample is a piece of a tar in a frame of its own, the last frame closes the
          tar. So `zstd -dc shard | tar x` and webdataset read the whole, and any sample is read without the
          rest.
tar       a plain tar whose members are zstd frames (`….npy.zst`), for readers that want offsets in a tar.
          Headers and padding are not compressed: about 6 kB a sample more.

Every member is .npy or JSON; nothing is pickled.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import numpy as np
import zstandard

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import canonical_json
from mlpmem_ds.core.typed_json import to_json
from mlpmem_ds.formats.target_encoding import TargetBlock, array_names

Container: TypeAlias = Literal["tar.zst", "tar"]

REMEDY = "run the stage that made it again, it remakes only what is damaged"
_LEVEL = 3  # levels 1 to 19 give the same size within 3 %
_HEADER_BYTES = tarfile.BLOCKSIZE
# Of a member: a damaged size must not ask for all the memory.
_MAX_BYTES_AN_ENTRY, _MAX_OTHER_BYTES = 8, 1 << 16
_MAX_MEMBER_BYTES = 1 << 30  # of a sample that no index describes
_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True, kw_only=True)
class TargetShard:
    """A shard as the manifest has it: the positions [first, first + count)."""

    name: str
    first: int
    count: int
    entries: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class StoredSample:
    """A sample as the index of its shard has it: the positions [first, first + count), `entries` in all, in
    `compressed_bytes` of the shard from `offset`, which hold `bytes` of tar."""

    key: str
    first: int
    count: int
    offset: int
    compressed_bytes: int
    bytes: int
    entries: int


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The samples of a shard in order, and where the last one ends."""

    samples: tuple[StoredSample, ...]
    end_offset: int


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleTable:
    """A shard's index in 32 bytes a sample, where its records are 500: a training comes back to each shard in
    every window, and reading an index of 1,024 samples takes three times as long as decoding one of them.

    int64, S samples: `firsts_S1` and `offsets_S1` [S + 1], the last of which are the ends; `bytes_S` and
    `entries_S`.
    """

    firsts_S1: np.ndarray
    offsets_S1: np.ndarray
    bytes_S: np.ndarray
    entries_S: np.ndarray

    @classmethod
    def of(cls, index: ShardIndex, shard: TargetShard) -> SampleTable:
        """Of an index without a fault (`fault_of_index`)."""
        samples = index.samples
        return cls(
            firsts_S1=np.array([*(sample.first for sample in samples), shard.first + shard.count], np.int64),
            offsets_S1=np.array([*(sample.offset for sample in samples), index.end_offset], np.int64),
            bytes_S=np.array([sample.bytes for sample in samples], np.int64),
            entries_S=np.array([sample.entries for sample in samples], np.int64),
        )

    def holding(self, start: int, stop: int) -> Iterator[StoredSample]:
        """The samples that hold some of the positions [start, stop), in order."""
        firsts_S = self.firsts_S1[:-1]
        number = max(int(np.searchsorted(firsts_S, start, side="right")) - 1, 0)
        for each in range(number, int(np.searchsorted(firsts_S, stop, side="left"))):
            first, end = self.firsts_S1[each : each + 2].tolist()
            offset, end_offset = self.offsets_S1[each : each + 2].tolist()
            yield StoredSample(
                key=sample_key(first),
                first=first,
                count=end - first,
                offset=offset,
                compressed_bytes=end_offset - offset,
                bytes=int(self.bytes_S[each]),
                entries=int(self.entries_S[each]),
            )


def shard_name(first: int, count: int, container: Container = "tar.zst", *, folder: str = "") -> str:
    """The file of the shard that holds the positions [first, first + count); `folder` ends with a slash."""
    return f"{folder}knn-{first:012d}-{count}.{container}"


def index_name(shard: str) -> str:
    """The index of samples next to a shard."""
    return f"{shard}.index.json"


def sample_key(first: int) -> str:
    return f"{first:012d}"


def write_shard(
    shard_path: Path, index_path: Path, blocks: Iterable[TargetBlock], *, container: Container = "tar.zst"
) -> dict[str, int]:
    """Write one shard and its index; the summary of both: `entries`, `samples`."""
    compressor = _compressor()
    samples: list[StoredSample] = []
    with open(shard_path, "wb") as stream:
        for block in blocks:
            content = _tar_of(block, compressor if container == "tar" else None)
            stored = content if container == "tar" else compressor.compress(content)
            samples.append(
                StoredSample(
                    key=sample_key(block.first),
                    first=block.first,
                    count=block.count,
                    offset=stream.tell(),
                    compressed_bytes=len(stored),
                    bytes=len(content),
                    entries=block.entries,
                )
            )
            stream.write(stored)
        index = ShardIndex(samples=tuple(samples), end_offset=stream.tell())
        stream.write(_END_OF_ARCHIVE if container == "tar" else compressor.compress(_END_OF_ARCHIVE))
    index_path.write_bytes(canonical_json(to_json(index)))
    return {"entries": sum(sample.entries for sample in samples), "samples": len(samples)}


def stored_bytes(block: TargetBlock, container: Container) -> int:
    """What a sample takes in a shard."""
    compressor = _compressor()
    if container == "tar":
        return len(_tar_of(block, compressor))
    return len(compressor.compress(_tar_of(block, None)))


def read_sample(
    path: Path, stream: BinaryIO, sample: StoredSample, *, container: str, encoding: str
) -> TargetBlock:
    """One sample of a shard, as stored; `sample` is its entry in the index.

    Raises:
        DamagedDataError: it is not what the index says.
    """
    where = f"{path}, sample {sample.key}"
    stored = os.pread(stream.fileno(), sample.compressed_bytes, sample.offset)
    if missing := sample.compressed_bytes - len(stored):
        raise DamagedDataError(f"{where}: the shard ends {missing} bytes too early; {REMEDY}")
    try:
        if container == "tar":
            if sample.bytes != len(stored):
                raise ValueError("the piece's size does not match the index")
            max_bytes = _MAX_BYTES_AN_ENTRY * (sample.entries + sample.count) + _MAX_OTHER_BYTES
            members = {
                name.removesuffix(".zst"): _decompress(content, max_bytes=max_bytes)
                for name, content in _members(stored).items()
            }
        else:
            members = _members(_decompress(stored, num_bytes=sample.bytes))
        return _block_of(members, sample, encoding)
    except (zstandard.ZstdError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DamagedDataError(f"{where} is damaged ({error}); {REMEDY}") from error


def fault_of_index(index: ShardIndex, shard: TargetShard, size: int) -> str | None:
    """Say where the index of a shard of `size` bytes contradicts the manifest or itself, or None."""
    first, offset = shard.first, 0
    for sample in index.samples:
        if (sample.first, sample.offset, sample.key) != (first, offset, sample_key(first)):
            return f"sample {sample.key} does not follow the one before it"
        first, offset = first + sample.count, offset + sample.compressed_bytes
    totals = (first - shard.first, sum(sample.entries for sample in index.samples), len(index.samples))
    if totals != (shard.count, shard.entries, shard.samples):
        return f"it counts {totals} positions, entries and samples where the manifest says otherwise"
    if index.end_offset != offset or not offset < size:
        return f"its samples end at byte {offset}, the shard has {size}"
    return None


def _compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, write_content_size=True)


def _tar_of(block: TargetBlock, compressor: zstandard.ZstdCompressor | None) -> bytes:
    """The members of one sample as a piece of a tar, without the end-of-archive blocks; compressed one by one
    if asked."""
    meta = {
        "first": block.first,
        "count": block.count,
        "entries": block.entries,
        "format": "mlpmem-targets",
        **block.details,
    }
    members = [(f"{name}.npy", _npy_of(array)) for name, array in block.arrays.items()]
    members.append(("meta.json", canonical_json(meta)))
    pieces = []
    for name, content in members:
        if compressor is not None:
            name, content = f"{name}.zst", compressor.compress(content)
        # Owner, group and time are 0 and the mode 0644 by default.
        header = tarfile.TarInfo(f"{sample_key(block.first)}.{name}")
        header.size = len(content)
        pieces += [header.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % tarfile.BLOCKSIZE)]
    return b"".join(pieces)


def _npy_of(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _decompress(frame: bytes, *, num_bytes: int | None = None, max_bytes: int = 0) -> bytes:
    """One frame, which must carry a checksum and say that it holds `num_bytes`, or at most `max_bytes`.

    Raises ValueError or ZstdError.
    """
    parameters = zstandard.get_frame_parameters(frame)
    size = parameters.content_size
    if not parameters.has_checksum or (size > max_bytes if num_bytes is None else size != num_bytes):
        raise ValueError("the frame's header does not match the index")
    return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)


def _members(content: bytes) -> dict[str, bytes]:
    """The files in a piece of a tar. `tarfile` does the same and takes longer than all the rest of reading a
    sample."""
    members, start = {}, 0
    while start < len(content):
        header = content[start : start + _HEADER_BYTES]
        if len(header) < _HEADER_BYTES:
            raise ValueError("a tar header is cut short")
        fields = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if int(header[148:156].rstrip(b" \0"), 8) != fields:
            raise ValueError("a tar header has another checksum")
        name, size = header[:100].rstrip(b"\0").decode("ascii"), int(header[124:136].rstrip(b" \0"), 8)
        start += _HEADER_BYTES
        if start + size > len(content):
            raise ValueError(f"{name} is cut short")
        members[name] = content[start : start + size]
        start += size + -size % tarfile.BLOCKSIZE
    return members


def _block_of(members: dict[str, bytes], sample: StoredSample, encoding: str) -> TargetBlock:
    block = block_of_members(
        {name.removeprefix(f"{sample.key}."): content for name, content in members.items()}, encoding
    )
    found, expected = (
        (block.first, block.count, block.entries),
        (sample.first, sample.count, sample.entries),
    )
    if found != expected:
        raise ValueError(f"first, rows and entries are {found}, the index says {expected}")
    return block


def block_of_members(members: Mapping[str, bytes], encoding: str) -> TargetBlock:
    """A sample from its files by the names behind its key (`counts.npy`, …, `meta.json`), as any reader of
    tars gives them; a plain tar's are frames, `counts.npy.zst`, ….

    Raises:
        ValueError, KeyError, TypeError, zstandard.ZstdError: they are no sample.
    """
    plain = {
        name.removesuffix(".zst"): (
            _decompress(content, max_bytes=_MAX_MEMBER_BYTES) if name.endswith(".zst") else content
        )
        for name, content in members.items()
    }
    arrays = {
        name: np.lib.format.read_array(io.BytesIO(plain[f"{name}.npy"]), allow_pickle=False)
        for name in array_names(encoding)
    }
    meta = json.loads(plain["meta.json"])
    details = {name: meta[name] for name in meta if name not in ("first", "count", "entries", "format")}
    return TargetBlock(
        first=meta["first"], count=meta["count"], entries=meta["entries"], arrays=arrays, details=details
    )


def tar_stream(stored: BinaryIO, container: Container) -> BinaryIO:
    """A shard's bytes as they are read from anywhere → those of a plain tar."""
    if container == "tar":
        return stored
    reader: BinaryIO = zstandard.ZstdDecompressor().stream_reader(stored, read_across_frames=True)
    return reader
