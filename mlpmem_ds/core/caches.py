"""Where libraries keep their caches when the home directory cannot be written, as in many containers."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# variable → where the library keeps it without; only caches that are made anew when they are lost
_CACHES = {
    "HF_MODULES_CACHE": "huggingface/modules",
    "TRITON_CACHE_DIR": ".triton/cache",
    "MPLCONFIGDIR": ".config/matplotlib",
}


def move_caches(environment: MutableMapping[str, str]) -> None:
    """Let caches that would lie where nothing can be written lie in a temporary directory, which is removed
    when the process ends; what the user has set stands.

    Called before the libraries are imported, because they look once.
    """
    missing = [
        name
        for name, place in _CACHES.items()
        if not environment.get(name) and not _can_be_written(_place_of(place, environment))
    ]
    if not missing:
        return
    try:
        folder = tempfile.mkdtemp(prefix="mlpmem-caches-")
    except OSError:  # nothing can be written at all: who needs it will say so
        return
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in missing:
        environment[name] = str(Path(folder, name.lower()))


def _place_of(place: str, environment: Mapping[str, str]) -> Path:
    home = Path(os.path.expanduser("~"))
    folder, _, rest = place.partition("/")
    if folder == "huggingface":
        caches = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
        return Path(environment.get("HF_HOME") or caches / folder) / rest
    if folder == ".config":
        return Path(environment.get("XDG_CONFIG_HOME") or home / folder) / rest
    return home / place


def _can_be_written(path: Path) -> bool:
    """Whether it is a directory that takes files, or can be made one."""
    existing = next((parent for parent in (path, *path.parents) if parent.exists()), None)
    return existing is not None and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
