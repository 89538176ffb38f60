"""Read an index directory: which files it has and which keys are in which shard. See README.md; faiss itself
is in engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.core.blocks import Block, deal
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.manifest import CompleteStage, Manifest, read_stage

TRAINED_NAME = "trained.faissindex"


def has_codes(factory: str) -> bool:
    """Whether a factory names a code for the vectors, and not their lists alone (`IVF1024`)."""
    return not factory.rpartition(",")[2].startswith("IVF")


def shard_name(shard: int, factory: str) -> str:
    """The file of a shard, relative to the directory: faiss's own, or lists without codes."""
    return f"shard-{shard}.faissindex" if has_codes(factory) else f"shard-{shard}.lists.npy"


def blocks_of_shard(blocks: list[Block], shard: int, num_shards: int) -> list[Block]:
    """The key units that a shard holds: shard, shard + num_shards, …"""
    return deal(blocks, shard, num_shards)


@dataclass(frozen=True, kw_only=True)
class IndexShard:
    """A file of the index and how many keys it holds."""

    name: str
    num_vectors: int


@dataclass(frozen=True, kw_only=True)
class IndexManifest(Manifest):
    """An index: the faiss factory that it was made by, its coarse lists, and its shards in order."""

    FORMAT: ClassVar[str] = "index"
    VERSION: ClassVar[int] = 1

    factory: str
    num_lists: int
    num_shards: int
    num_vectors: int
    shards: tuple[IndexShard, ...]


@dataclass(frozen=True, kw_only=True)
class IndexDirectory(CompleteStage[IndexManifest]):
    """A complete index directory."""

    @property
    def factory(self) -> str:
        return self.manifest.factory

    @property
    def has_codes(self) -> bool:
        """Whether its vectors are stored too, as codes of faiss; else lists alone."""
        return has_codes(self.factory)

    @property
    def num_lists(self) -> int:
        return self.manifest.num_lists

    @property
    def num_vectors(self) -> int:
        return self.manifest.num_vectors

    @property
    def keys_sha256(self) -> str:
        """The manifest checksum of the keys that the index holds."""
        return self.inputs["keys"]

    @property
    def trained_path(self) -> Path:
        return self.root / TRAINED_NAME

    def check(self, name: str | None = None) -> None:
        """Compare every file, or the one of this name, with its checksum.

        Raises:
            DamagedDataError: one has another.
        """
        self.check_files(None if name is None else [name])

    @property
    def shard_paths(self) -> list[Path]:
        return [self.root / shard.name for shard in self.manifest.shards]


def open_index(root: Path, *, flag: str = "--index") -> IndexDirectory:
    """Open a complete index directory.

    Raises:
        UserError: no index there.
        DamagedDataError: files missing, of another size or version.
    """
    index = read_stage(IndexDirectory, IndexManifest, root, flag=flag)
    if sum(shard.num_vectors for shard in index.manifest.shards) != index.num_vectors:
        raise DamagedDataError(
            f"the manifest of {root} contradicts itself on the number of vectors: build the index again"
        )
    return index
