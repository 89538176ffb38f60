"""A value that every rank needs before the stage begins, and that takes long: one rank computes it, and keeps
it in a hidden file of the output for the others and for the next start.

The file is removed when the stage is complete: it is no part of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlpmem_ds.core.claims import ClaimWatch, claim
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import content_hash, publish_json, read_sealed_json
from mlpmem_ds.core.waiting import Patience
from mlpmem_ds.core.world import World

_SUFFIX = ".once.json"
_MAX_BYTES = 1 << 36  # what was found in 1 GB of inputs may be larger than they are


def computed_once(
    folder: Path, name: str, of: Any, compute: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """What `compute` gives, on every rank that asks; computed by one of them.

    Args:
        folder: of the stage's output; made where it does not exist.
        name: of the value.
        of: plain values that decide it (sizes and times of files): with others it is computed anew.
        compute: gives the value, which JSON can hold.
    """
    path = folder / f".{name}-{content_hash(of)[:16]}{_SUFFIX}"
    folder.mkdir(parents=True, exist_ok=True)
    patience, watch = Patience(), ClaimWatch()
    claim_path = path.with_name(f"{path.name}.claim")
    while True:
        if (value := _read(path)) is not None:
            return value
        with claim(claim_path, watch=watch) as is_mine:
            if is_mine:
                value = _read(path)  # made while this rank looked at the claim
                if value is None:
                    value = dict(compute())
                    publish_json(path, value, seal=True)
                return value
        patience.log("waiting for another rank's %s", name)
        patience.sleep()


def shared_place(output: Path, world: World) -> Path | None:
    """Where the ranks of a stage keep such values; None for one rank, which need not write anything yet."""
    return output if world.size > 1 else None


def remove_computed(folder: Path) -> None:
    """Remove the values that were kept in a stage's output."""
    for path in folder.glob(f".*{_SUFFIX}"):
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_sealed_json(path, max_bytes=_MAX_BYTES)
    except DamagedDataError:  # none yet, or one that cannot be believed
        return None
