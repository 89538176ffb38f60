"""Part of `prepare_corpus`: several ranks share the first reading of the inputs: each file is read by one.

What a rank found in some files lies in a hidden file of the output (core/once.py), where the others read it,
also those of the next start. A rank finds its own share first, and then goes through all in order, so that
the share of a rank that is slow or gone is found by others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlpmem_ds.core.blocks import deal
from mlpmem_ds.core.once import computed_once
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.documents import SourceFile

_MIN_CHUNK_BYTES, _MAX_CHUNK_BYTES = 4 << 20, 1 << 30
_CHUNKS_OF_RANK = 4
Chunk = tuple[SourceFile, ...]


def chunks_of(files: Sequence[SourceFile], size: int) -> list[Chunk]:
    """The files in order, cut into pieces that `size` ranks share evenly, by their bytes."""
    total = sum(file.num_bytes for file in files)
    each = min(max(total // (_CHUNKS_OF_RANK * size), _MIN_CHUNK_BYTES), _MAX_CHUNK_BYTES)
    return list(groups_of(files, each))


def groups_of(files: Iterable[SourceFile], num_bytes: int) -> Iterator[Chunk]:
    """The files in order, in pieces of at least so many bytes, but for the last."""
    group: list[SourceFile] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.num_bytes
        if size >= num_bytes:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def shared_findings(
    chunks: Sequence[Chunk],
    find: Callable[[Chunk], Mapping[str, Any]],
    *,
    settings: Mapping[str, Any],
    folder: Path,
    world: World,
) -> Iterator[Mapping[str, Any]]:
    """What `find` finds in each chunk, in order; each chunk is read by one of the ranks.

    Args:
        chunks: of files.
        find: reads a chunk, gives what JSON can hold.
        settings: plain values that what is found depends on, besides the files.
        folder: the stage's output.
        world: this rank.
    """

    def finding(chunk: Chunk) -> Mapping[str, Any]:
        if any(file.kind == "dataset" for file in chunk):  # nothing tells whether it is still the same
            return find(chunk)
        seen = [[file.name, file.is_named, _groups_above(file), *_state_of(file)] for file in chunk]
        return computed_once(folder, "survey", [settings, seen], lambda: find(chunk))

    for chunk in deal(chunks, world.rank, world.size):
        finding(chunk)
    for chunk in chunks:
        yield finding(chunk)


def _groups_above(file: SourceFile) -> list[str]:
    """The folders `NAME=VALUE` that it lies in, one of which may be its group: a new name of theirs leaves
    the file as it is."""
    return [folder for folder in file.path.parent.parts if "=" in folder]


def _state_of(file: SourceFile) -> tuple[int, ...]:
    """What changes with a file's content or with who may read it; nothing where it cannot be asked."""
    try:
        state = file.path.stat()
    except OSError:  # said where the file is read
        return ()
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns
