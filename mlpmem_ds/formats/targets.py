"""kNN targets on disk: read any positions, in any order, as CSR rows; what is damaged is refused. README.md
is the specification.

A sample holds one block of positions. `target_encoding` says what its arrays mean, `target_shards` how
samples become files.

Shape legend: n rows (positions) at hand, E entries of all rows, V token ids.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import FileRecord, fault_of_file, read_json
from mlpmem_ds.core.manifest import read_manifest
from mlpmem_ds.core.typed_json import from_json
from mlpmem_ds.formats.target_encoding import (
    Encoding,
    TargetBlock,
    frequency_order,
    pack_block,
    unpack_block,
)
from mlpmem_ds.formats.target_shards import (
    FORMAT,
    REMEDY,
    Container,
    fault_of_index,
    index_name,
    read_sample,
    shard_name,
    stored_bytes,
    write_shard,
)
from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.maths.weighting import Weighting

__all__ = [
    "FORMAT",
    "ORDER_NAME",
    "Container",
    "Encoding",
    "TargetBlock",
    "Targets",
    "frequency_order",
    "index_name",
    "open_targets",
    "pack_block",
    "shard_name",
    "stored_bytes",
    "version_of",
    "write_shard",
]

ORDER_NAME = "frequency_order.npy"
_VERSIONS = (1, 2)


def version_of(encoding: Encoding, container: Container) -> int:
    """1 where a reader of version 1 understands the directory."""
    return 1 if (encoding, container) == ("exact", "tar.zst") else 2


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

    @property
    def encoding(self) -> str:
        """`exact` or `compact`."""
        return self.manifest.get("encoding", "exact")

    @property
    def container(self) -> str:
        """`tar.zst` or `tar`."""
        return self.manifest.get("container", "tar.zst")

    @property
    def weighting(self) -> Weighting:
        """How the neighbours were weighted."""
        where = str(self.root / "manifest.json")
        return from_json(Weighting, self.manifest["weighting"], where=where, version=_VERSIONS[-1])

    def read(self, start: int, stop: int) -> SparseRows:
        """The rows of positions [start, stop); only the samples that hold them are read.

        Raises:
            DamagedDataError: a sample is cut short or altered, or an index disagrees with its shard.
        """
        if not 0 <= start <= stop <= self.num_positions:
            raise ValueError(f"positions [{start}, {stop}) are not among {self.num_positions}")
        parts = [
            rows.rows(max(start - first, 0), min(stop - first, rows.num_rows))
            for shard in self._shards_of(start, stop)
            for first, rows in self._samples_of(shard, start, stop)
        ]
        return SparseRows.join(parts) if parts else SparseRows.empty(0).astype(np.int32, np.float32)

    def gather(self, positions_n: np.ndarray) -> SparseRows:
        """The rows of any positions, in their order, repeated ones too; a sample that holds several of them
        is read once."""
        positions_n = np.asarray(positions_n, dtype=np.int64)
        if len(positions_n) and not 0 <= positions_n.min() <= positions_n.max() < self.num_positions:
            raise ValueError(f"some positions are not among {self.num_positions}")
        wanted = np.unique(positions_n)
        size = self.manifest["block_size"]
        if not len(wanted):
            return self.read(0, 0)
        parts = []
        for chosen in np.split(wanted, np.flatnonzero(np.diff(wanted // size)) + 1):
            first = int(chosen[0]) // size * size
            parts.append(self.read(first, min(first + size, self.num_positions)).take(chosen - first))
        return SparseRows.join(parts).take(np.searchsorted(wanted, positions_n))

    def read_all(self) -> SparseRows:
        """Every row, after comparing each shard with its checksum."""
        for shard in self.manifest["shards"]:
            self.check(shard["name"])
        return self.read(0, self.num_positions)

    def check(self, name: str) -> None:
        """Compare a file with its checksum.

        Raises:
            DamagedDataError: it has another.
        """
        if fault := fault_of_file(self.root, self._record(name)):
            raise DamagedDataError(f"{fault}; {REMEDY}")

    @cached_property
    def _order_V(self) -> np.ndarray | None:
        """The vocabulary's order of frequency, where the encoding needs it."""
        if self.encoding == "exact":
            return None
        self.check(ORDER_NAME)
        order_V = np.load(self.root / ORDER_NAME, allow_pickle=False)
        if not np.array_equal(np.sort(order_V), np.arange(self.manifest["vocab_size"])):
            raise DamagedDataError(f"{self.root / ORDER_NAME} does not name each token once; {REMEDY}")
        return order_V

    def _shards_of(self, start: int, stop: int) -> list[dict[str, Any]]:
        """The shards that hold some of the positions [start, stop)."""
        shards = self.manifest["shards"]
        if start >= stop:
            return []
        first = bisect_right(shards, start, key=lambda shard: shard["first"]) - 1
        return shards[first : bisect_left(shards, stop, key=lambda shard: shard["first"])]

    def _samples_of(self, shard: dict[str, Any], start: int, stop: int) -> Iterator[tuple[int, SparseRows]]:
        """(first position, rows) of the samples of a shard that hold some of the positions [start, stop)."""
        samples, order_V = self._index_of(shard), self._order_V
        path = self.root / shard["name"]
        with open(path, "rb", buffering=0) as stream:
            for sample in samples:
                if sample["first"] < stop and start < sample["first"] + sample["count"]:
                    block = read_sample(
                        path, stream, sample, container=self.container, encoding=self.encoding
                    )
                    try:
                        yield sample["first"], unpack_block(block, self.encoding, order_V)
                    except (ValueError, KeyError, TypeError) as error:
                        raise DamagedDataError(
                            f"{path}, sample {sample['key']} is damaged ({error}); {REMEDY}"
                        ) from error

    def _index_of(self, shard: dict[str, Any]) -> list[dict[str, Any]]:
        """The samples of a shard, once its index is known to be whole and to agree with the manifest."""
        name = shard["name"]
        if name not in self._indexes:
            self.check(index_name(name))
            index = read_json(self.root / index_name(name))
            size = self._record(name).bytes
            if fault := fault_of_index(index, shard, size):
                raise DamagedDataError(f"{self.root / index_name(name)}: {fault}; {REMEDY}")
            self._indexes[name] = index["samples"]
        return self._indexes[name]

    def _record(self, name: str) -> FileRecord:
        for entry in self.manifest["files"]:
            if entry["name"] == name:
                return FileRecord(**entry)
        raise DamagedDataError(f"the manifest of {self.root} does not record {name}; {REMEDY}")


def open_targets(root: Path, *, flag: str = "--targets") -> Targets:
    """Open a complete target directory.

    Raises:
        UserError: no targets there.
        DamagedDataError: files missing, of another size or version, or shards that do not cover the
            positions.
    """
    manifest, sha256 = read_manifest(root, stage=FORMAT, version=_version_there(root), flag=flag)
    stop = 0
    for shard in manifest["shards"]:
        if shard["first"] != stop:
            raise DamagedDataError(
                f"the shards of {root} leave positions from {stop:,} out: write the targets again"
            )
        stop += shard["count"]
    if stop != manifest["num_positions"]:
        raise DamagedDataError(
            f"the shards of {root} hold {stop:,} of {manifest['num_positions']:,} positions: write the"
            " targets again"
        )
    return Targets(root=root, sha256=sha256, manifest=manifest)


def _version_there(root: Path) -> int:
    """The version of a directory, if it is one that this reader knows; else the newest, which its refusal
    then names."""
    path = root / "manifest.json"
    found = read_json(path).get("version") if path.is_file() else None
    return found if found in _VERSIONS else _VERSIONS[-1]
