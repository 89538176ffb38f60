"""Read an index directory: which files it has and which keys are in which shard. See README.md; faiss itself
is in engines."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpmem_ds.core.blocks import Block, deal
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import FileRecord, fault_of_file
from mlpmem_ds.core.manifest import read_manifest

FORMAT, VERSION = "index", 1
TRAINED_NAME = "trained.faissindex"


def shard_name(shard: int) -> str:
    """The file of a shard, relative to the directory."""
    return f"shard-{shard}.faissindex"


def blocks_of_shard(blocks: list[Block], shard: int, num_shards: int) -> list[Block]:
    """The key units that a shard holds: shard, shard + num_shards, …"""
    return deal(blocks, shard, num_shards)


@dataclass(frozen=True, kw_only=True)
class IndexDirectory:
    """A complete index directory."""

    root: Path
    sha256: str
    manifest: dict[str, Any] = field(repr=False, hash=False)

    @property
    def factory(self) -> str:
        return self.manifest["factory"]

    @property
    def num_lists(self) -> int:
        return self.manifest["num_lists"]

    @property
    def num_vectors(self) -> int:
        return self.manifest["num_vectors"]

    @property
    def keys_sha256(self) -> str:
        """The manifest checksum of the keys that the index holds."""
        return self.manifest["inputs"]["keys"]

    @property
    def num_bytes(self) -> int:
        """All its files on disk."""
        return sum(entry["bytes"] for entry in self.manifest["files"])

    @property
    def trained_path(self) -> Path:
        return self.root / TRAINED_NAME

    def check(self, name: str | None = None) -> None:
        """Compare every file, or the one of this name, with its checksum.

        Raises:
            DamagedDataError: one has another.
        """
        for entry in self.manifest["files"]:
            if name is not None and entry["name"] != name:
                continue
            if fault := fault_of_file(self.root, FileRecord(**entry)):
                raise DamagedDataError(
                    f"{fault}: run the stage that made {self.root} again, it remakes only what is damaged"
                )

    @property
    def shard_paths(self) -> list[Path]:
        return [self.root / shard["name"] for shard in self.manifest["shards"]]


def open_index(root: Path, *, flag: str = "--index") -> IndexDirectory:
    """Open a complete index directory.

    Raises:
        UserError: no index there.
        DamagedDataError: files missing, of another size or version.
    """
    manifest, sha256 = read_manifest(root, stage=FORMAT, version=VERSION, flag=flag)
    if sum(shard["num_vectors"] for shard in manifest["shards"]) != manifest["num_vectors"]:
        raise DamagedDataError(
            f"the manifest of {root} contradicts itself on the number of vectors: build the index again"
        )
    return IndexDirectory(root=root, sha256=sha256, manifest=manifest)
