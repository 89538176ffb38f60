"""What is fuzzed: a way to write files of known content, our reader of them, and what their bytes hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Content:
    """What was read: the values in their order, and how much was left out by name: what may hold text, and
    documents without text."""

    values: Sequence[Any]
    num_left_out: int = 0
    num_empty: int = 0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Files on the disk, and what they hold.

    `inputs` are named by the user, `files` those of them, or below them, that may be damaged.
    """

    inputs: tuple[Path, ...]
    files: tuple[Path, ...]
    content: Content
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of file.

    `write` makes a sample in an empty folder; `read` is ours, and refuses with a UserError. `expect` is an
    independent reading of what the files hold now, and is simple where ours is fast: it has them whole in
    memory. It raises `Damaged` where a whole file cannot have these bytes. Without `expect`, any content is
    accepted: the files have no check, and nothing else reads them.
    """

    name: str
    write: Callable[[Random, Path], Sample]
    read: Callable[[Sample], Content]
    expect: Callable[[Sample], Content] | None


Store = Callable[[Random, Path, Sequence[str]], Sample]
"""writes these texts to files in an empty folder"""


class Damaged(ValueError):
    """The bytes are not those of a whole file."""
