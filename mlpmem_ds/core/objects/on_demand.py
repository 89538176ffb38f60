"""Files of directories in the cache that are fetched when they are first read, and not before; and what to do
about damaged ones.

Those of which a rank reads a part: token shards and target shards. Who is about to open a file of a stage
asks `CompleteStage.path_of` (core/manifest.py), which asks here; for any other directory that is one look at
a dictionary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType

from mlpmem_ds.core.files import FileRecord

PATTERNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "corpus": ("*/tokens-*.bin", "*/answers-*.bin"),
        "targets": ("knn-*.tar*", "*/knn-*.tar*"),
    }
)
"""format → names of its files that are fetched on demand; their readers go through `path_of`"""

SOURCE = "source.json"
"""next to a directory of the cache: where it is from (core/objects/cache.py)"""
MARK = ".mlpmem-cache"
"""a file of each `CACHE/<listing>`: it is the cache's own, to be removed when room is needed"""
_HOME = re.compile("[0-9a-f]{16}")
_FETCHERS: dict[Path, Callable[[FileRecord], None]] = {}


def is_on_demand(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def register(root: Path, fetch: Callable[[FileRecord], None]) -> None:
    """From now on `fetch` is called before a file below `root` is opened."""
    _FETCHERS[root] = fetch


def forget(root: Path) -> None:
    _FETCHERS.pop(root, None)


def is_fetched_on_demand(root: Path) -> bool:
    """Whether files of this directory may be missing until they are read."""
    return root in _FETCHERS


def is_home(path: Path) -> bool:
    """Whether a path is a `CACHE/<listing>` that the cache has made."""
    return bool(_HOME.fullmatch(path.name)) and (path / MARK).is_file() and not path.is_symlink()


def remedy_of(root: Path, *, local: str) -> str:
    """What to do about a damaged file of a directory: where it is one of the cache, or below one, the same
    command fetches the file again."""
    is_cached = any(is_home(parent) for parent in root.absolute().parents)
    return (
        "it is a copy in the cache: give the same command again, which fetches it anew"
        if is_cached
        else local
    )


def ensure(root: Path, record: FileRecord) -> None:
    """Fetch a file that is not there yet; raises as `fetch.fetch_file`."""
    fetch = _FETCHERS.get(root)
    if fetch is not None:
        fetch(record)
