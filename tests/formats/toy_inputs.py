"""Small files below a directory, and what `find_files` says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlpmem_ds.formats.input_files import find_files


def names(*inputs: str, exclude: tuple[str, ...] = ()) -> list[str]:
    return [file.name for file in find_files(inputs, None, exclude).files]


def reasons(root: Path, **how: Any) -> dict[str, str]:
    found = find_files([str(root)], how.get("include"), how.get("exclude", ()))
    return {omission.name: omission.reason for omission in found.omissions}


def write(root: Path, *files: str, text: str = "some text") -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
