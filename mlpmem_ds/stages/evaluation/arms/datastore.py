"""The stored keys, their index and their targets, as `--keys`, `--index` and `--targets` name them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.index_directory import IndexDirectory, open_index
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.formats.targets import Targets, open_targets


@dataclass(frozen=True, kw_only=True)
class Datastore:
    """Keys, with what was made of them."""

    keys: Keys
    index: IndexDirectory | None
    targets: Targets | None

    @property
    def layers_path(self) -> str | None:
        """Where the base's layers are, if extraction had to be told."""
        return self.keys.manifest.layers_path

    def stages_of_targets(self) -> list[Path | None]:
        """The directories that targets need; None in the place of one that was not given."""
        if self.targets is None:
            return [self.keys.root, None]
        is_searched = self.targets.manifest.search == "ivf"
        index = [None if self.index is None else self.index.root] if is_searched else []
        return [self.keys.root, *index, self.targets.root]


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
