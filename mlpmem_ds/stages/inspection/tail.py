"""Part of `inspect_run --watch`: what was added to a file of JSON lines since the last look."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlpmem_ds.core.log import parse_json_lines

_NONE = -1


class LineTail:
    """Reads a growing file of JSON lines: a look is one open, and one read where there is something new.

    Opening is what makes a client of a network file system ask the server whether the file has grown.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = _NONE, 0

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """(the objects that were added, whether the file was begun anew: then these are all of it)."""
        try:
            stream = open(self._path, "rb")  # noqa: SIM115
        except OSError:
            return [], False
        with stream:
            state = os.fstat(stream.fileno())
            is_other = state.st_ino != self._inode or state.st_size < self._offset
            is_anew = is_other and self._inode != _NONE
            if is_other:
                self._inode, self._offset = state.st_ino, 0
            if state.st_size <= self._offset:
                return [], is_anew
            stream.seek(self._offset)
            content = stream.read()
        whole = content[: content.rfind(b"\n") + 1]  # the last line may be half written
        self._offset += len(whole)
        return parse_json_lines(whole), is_anew
