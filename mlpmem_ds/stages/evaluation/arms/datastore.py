"""The stored keys, their index and their targets, as `--keys`, `--index` and `--targets` name them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.run_description import find_input
from mlpmem_ds.formats.index_directory import IndexDirectory, open_index
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.formats.targets import Targets, open_targets


@dataclass(frozen=True, kw_only=True)
class Datastore:
    """Keys, with what was made of them."""

    keys: Keys
    index: IndexDirectory | None
    targets: Targets | None


def read_datastore(keys: Path | None, index: Path | None, targets: Path | None) -> Datastore | None:
    """Open the directories; None without keys.

    Raises:
        UserError: one is missing, or is of other keys.
    """
    if keys is None:
        return None
    opened = open_keys(keys)
    opened_index = None if index is None else open_index(index)
    if opened_index is not None and opened_index.keys_sha256 != opened.sha256:
        raise UserError(f"--index {index} is of other keys than --keys {keys}: build it again from these")
    opened_targets = None if targets is None else open_targets(targets)
    if opened_targets is not None and opened_targets.keys_sha256 != opened.sha256:
        raise UserError(
            f"--targets {targets} are of other keys than --keys {keys}: write them again from these"
        )
    return Datastore(keys=opened, index=opened_index, targets=opened_targets)


def stages_of_targets(targets: Path | None, *, index: Path | None) -> list[Path | None]:
    """The directories of the targets and of what was made of their keys for them; None in the place of one
    that is not found. `index` is where their index may be."""
    if targets is None:
        return [None]
    opened = open_targets(targets, has_shards=False)
    if opened.manifest.search != "ivf":
        return [targets]
    return [find_input(targets, "index", opened.inputs.get("index"), given=index), targets]
