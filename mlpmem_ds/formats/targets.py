"""kNN targets on disk: webdataset tars in multi-frame zstd, a frame index beside each. README.md is the specification.

One sample is one block of positions. Each sample is a zstd frame of its own, so any range of positions is read without
the rest; the last frame closes the tar, so `zstd -dc | tar x` and webdataset read the whole.

Shape legend: n rows (positions) at hand, E entries of all rows.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import FileRecord, canonical_json, fault_of_file, read_json
from mlpmem_ds.core.stage_directory import read_manifest
from mlpmem_ds.maths.targets import SparseRows

FORMAT, VERSION = "targets", 1
_LEVEL = 3  # levels 1 to 19 give the same size within 3 %
_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)
_ARRAYS = ("counts", "ids", "probabilities", "dropped")
_REMEDY = "run the stage that made it again, it remakes only what is damaged"


@dataclass(frozen=True, kw_only=True)
class TargetRows:
    """Sparse targets of consecutive positions: row r has ``ids[offsets[r]:offsets[r + 1]]``, ascending.

    ``offsets`` int64 [n + 1], ``ids`` int32 [E], ``probabilities`` float32 [E] (not renormalised after truncation),
    ``dropped`` float32 [n], the mass that truncation took away.
    """

    offsets: np.ndarray
    ids: np.ndarray
    probabilities: np.ndarray
    dropped: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TargetBlock:
    """One sample as it is stored: ``counts`` uint16 [n], ``ids`` [E], ``probabilities`` float16 [E], ``dropped`` float16 [n]."""

    first: int
    counts: np.ndarray
    ids: np.ndarray
    probabilities: np.ndarray
    dropped: np.ndarray


def shard_name(first: int, count: int) -> str:
    """The file of the shard that holds the positions [first, first + count)."""
    return f"knn-{first:012d}-{count}.tar.zst"


def index_name(shard: str) -> str:
    """The frame index beside a shard."""
    return f"{shard}.index.json"


def pack_block(first: int, rows: SparseRows, dropped_n: np.ndarray, *, dtype: np.dtype[Any]) -> TargetBlock:
    """Bring float64 rows to the precision of the format; entries that float16 rounds to 0 join the dropped mass."""
    row_of_E = np.repeat(np.arange(len(dropped_n)), np.diff(rows.offsets))
    halves_E = rows.probabilities.astype(np.float16)
    kept_E = halves_E > 0
    lost_n = np.bincount(row_of_E[~kept_E], weights=rows.probabilities[~kept_E], minlength=len(dropped_n))
    return TargetBlock(
        first=first,
        counts=np.bincount(row_of_E[kept_E], minlength=len(dropped_n)).astype("<u2"),
        ids=rows.ids[kept_E].astype(dtype),
        probabilities=halves_E[kept_E].astype("<f2"),
        dropped=(dropped_n + lost_n).astype("<f2"),
    )


def write_shard(shard_path: Path, index_path: Path, blocks: Iterable[TargetBlock]) -> dict[str, int]:
    """Write one shard and its frame index; the summary of both: `entries`, `samples`."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, write_content_size=True)
    samples: list[dict[str, Any]] = []
    with open(shard_path, "wb") as stream:
        for block in blocks:
            content = _tar_of(block)
            frame = compressor.compress(content)
            samples.append(
                {
                    "key": _key(block.first),
                    "first": block.first,
                    "count": len(block.counts),
                    "offset": stream.tell(),
                    "compressed_bytes": len(frame),
                    "bytes": len(content),
                    "entries": len(block.ids),
                }
            )
            stream.write(frame)
        end_offset = stream.tell()
        stream.write(compressor.compress(_END_OF_ARCHIVE))
    index_path.write_bytes(canonical_json({"samples": samples, "end_offset": end_offset}))
    return {"entries": sum(sample["entries"] for sample in samples), "samples": len(samples)}


@dataclass(frozen=True, kw_only=True)
class Targets:
    """A complete target directory; shards stay on disk until asked for."""

    root: Path
    sha256: str
    manifest: dict[str, Any] = field(repr=False, hash=False)
    _indexes: dict[str, list[dict[str, Any]]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_positions(self) -> int:
        return self.manifest["num_positions"]

    @property
    def keys_sha256(self) -> str:
        """The manifest checksum of the keys that the targets come from."""
        return self.manifest["inputs"]["keys"]

    def read(self, start: int, stop: int) -> TargetRows:
        """The rows of positions [start, stop); only the frames that hold them are read.

        Raises:
            DamagedDataError: a frame is cut short or altered, or a frame index disagrees with its shard.
        """
        if not 0 <= start <= stop <= self.num_positions:
            raise ValueError(f"positions [{start}, {stop}) are not among {self.num_positions}")
        return _join(
            [
                _cut(block, start, stop)
                for shard in self.manifest["shards"]
                if shard["first"] < stop and start < shard["first"] + shard["count"]
                for block in self._blocks(shard, start, stop)
            ]
        )

    def read_all(self) -> TargetRows:
        """Every row, after comparing each shard with its checksum."""
        for shard in self.manifest["shards"]:
            self._check(shard["name"])
        return self.read(0, self.num_positions)

    def _blocks(self, shard: dict[str, Any], start: int, stop: int) -> Iterator[TargetBlock]:
        samples = self._samples(shard)
        path = self.root / shard["name"]
        decompressor = zstandard.ZstdDecompressor()
        with open(path, "rb") as stream:
            for sample in samples:
                if sample["first"] < stop and start < sample["first"] + sample["count"]:
                    yield _read_block(path, stream, sample, decompressor)

    def _samples(self, shard: dict[str, Any]) -> list[dict[str, Any]]:
        """The frame index of a shard, once it is known to be whole and to agree with the manifest."""
        name = shard["name"]
        if name not in self._indexes:
            self._check(index_name(name))
            index = read_json(self.root / index_name(name))
            size = self._record(name).bytes
            if fault := _fault_of_index(index, shard, size):
                raise DamagedDataError(f"{self.root / index_name(name)}: {fault}; {_REMEDY}")
            self._indexes[name] = index["samples"]
        return self._indexes[name]

    def _record(self, name: str) -> FileRecord:
        for entry in self.manifest["files"]:
            if entry["name"] == name:
                return FileRecord(**entry)
        raise DamagedDataError(f"the manifest of {self.root} does not record {name}; {_REMEDY}")

    def _check(self, name: str) -> None:
        if fault := fault_of_file(self.root, self._record(name)):
            raise DamagedDataError(f"{fault}; {_REMEDY}")


def open_targets(root: Path, *, flag: str = "--targets") -> Targets:
    """Open a complete target directory.

    Raises:
        UserError: no targets there.
        DamagedDataError: files missing, of another size or version, or shards that do not cover the positions.
    """
    manifest, sha256 = read_manifest(root, stage=FORMAT, version=VERSION, flag=flag)
    stop = 0
    for shard in manifest["shards"]:
        if shard["first"] != stop:
            raise DamagedDataError(f"the shards of {root} leave positions from {stop:,} out: write the targets again")
        stop += shard["count"]
    if stop != manifest["num_positions"]:
        raise DamagedDataError(
            f"the shards of {root} hold {stop:,} of {manifest['num_positions']:,} positions: write the targets again"
        )
    return Targets(root=root, sha256=sha256, manifest=manifest)


def _key(first: int) -> str:
    return f"{first:012d}"


def _tar_of(block: TargetBlock) -> bytes:
    """The members of one sample as a piece of a tar, without the end-of-archive blocks."""
    meta = {
        "first": block.first,
        "count": len(block.counts),
        "entries": len(block.ids),
        "format": f"mlpmem-{FORMAT}",
        "version": VERSION,
    }
    members = [(f"{name}.npy", _npy_of(getattr(block, name))) for name in _ARRAYS]
    members.append(("meta.json", canonical_json(meta)))
    pieces = []
    for name, content in members:
        header = tarfile.TarInfo(
            f"{_key(block.first)}.{name}"
        )  # owner, group and time are 0 and the mode 0644 by default
        header.size = len(content)
        pieces += [header.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % tarfile.BLOCKSIZE)]
    return b"".join(pieces)


def _npy_of(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _read_block(
    path: Path, stream: BinaryIO, sample: dict[str, Any], decompressor: zstandard.ZstdDecompressor
) -> TargetBlock:
    """One sample of a shard.

    Raises:
        DamagedDataError: it is not what the frame index says.
    """
    where = f"{path}, sample {sample['key']}"
    frame = os.pread(stream.fileno(), sample["compressed_bytes"], sample["offset"])
    if len(frame) != sample["compressed_bytes"]:
        raise DamagedDataError(
            f"{where}: the shard ends {sample['compressed_bytes'] - len(frame)} bytes too early; {_REMEDY}"
        )
    try:
        parameters = zstandard.get_frame_parameters(frame)
        if not parameters.has_checksum or parameters.content_size != sample["bytes"]:
            raise DamagedDataError(f"{where}: the frame's header does not match the index; {_REMEDY}")
        content = decompressor.decompress(frame, allow_extra_data=False)
        return _unpack_block(content, sample)
    except (zstandard.ZstdError, tarfile.TarError, ValueError, KeyError, EOFError) as error:
        if isinstance(error, DamagedDataError):
            raise
        raise DamagedDataError(f"{where} is damaged ({error}); {_REMEDY}") from error


def _unpack_block(content: bytes, sample: dict[str, Any]) -> TargetBlock:
    """The arrays of a sample; ValueError, KeyError or TarError where they do not fit together."""
    members = {}
    with tarfile.open(fileobj=io.BytesIO(content + _END_OF_ARCHIVE), mode="r:") as archive:
        for member in archive:
            stream = archive.extractfile(member)
            assert stream is not None
            members[member.name] = stream.read()
    key = sample["key"]
    arrays = {name: np.load(io.BytesIO(members[f"{key}.{name}.npy"]), allow_pickle=False) for name in _ARRAYS}
    meta = json.loads(members[f"{key}.meta.json"])
    block = TargetBlock(first=meta["first"], **arrays)
    found = (block.first, len(block.counts), len(block.ids), int(block.counts.sum(dtype=np.int64)))
    wanted = (sample["first"], sample["count"], sample["entries"], sample["entries"])
    if found != wanted or len(block.probabilities) != len(block.ids) or len(block.dropped) != len(block.counts):
        raise ValueError(f"first, rows, entries and counts are {found}, the index says {wanted}")
    return block


def _fault_of_index(index: dict[str, Any], shard: dict[str, Any], size: int) -> str | None:
    """Say where a frame index contradicts the manifest or itself, or None."""
    first, offset = shard["first"], 0
    for sample in index["samples"]:
        if sample["first"] != first or sample["offset"] != offset or sample["key"] != _key(first):
            return f"sample {sample['key']} does not follow the one before it"
        first, offset = first + sample["count"], offset + sample["compressed_bytes"]
    totals = (first - shard["first"], sum(sample["entries"] for sample in index["samples"]), len(index["samples"]))
    if totals != (shard["count"], shard["entries"], shard["samples"]):
        return f"it counts {totals} positions, entries and samples where the manifest says otherwise"
    if index["end_offset"] != offset or not offset < size:
        return f"its samples end at byte {offset}, the shard has {size}"
    return None


def _cut(block: TargetBlock, start: int, stop: int) -> TargetBlock:
    """The rows of a block that are positions in [start, stop)."""
    low, high = max(start - block.first, 0), min(stop - block.first, len(block.counts))
    if (low, high) == (0, len(block.counts)):
        return block
    offsets = np.concatenate([[0], np.cumsum(block.counts, dtype=np.int64)])
    entries = slice(int(offsets[low]), int(offsets[high]))
    return TargetBlock(
        first=block.first + low,
        counts=block.counts[low:high],
        ids=block.ids[entries],
        probabilities=block.probabilities[entries],
        dropped=block.dropped[low:high],
    )


def _join(blocks: list[TargetBlock]) -> TargetRows:
    counts = _concatenate([block.counts for block in blocks], np.int64)
    return TargetRows(
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        ids=_concatenate([block.ids for block in blocks], np.int32),
        probabilities=_concatenate([block.probabilities for block in blocks], np.float32),
        dropped=_concatenate([block.dropped for block in blocks], np.float32),
    )


def _concatenate(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(parts, dtype=dtype) if parts else np.empty(0, dtype)
