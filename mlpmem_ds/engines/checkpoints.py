"""Checkpoints of many ranks: saved so that a kill at any moment leaves the last one; found and verified.

`engines.deepspeed` gives the writer; the files on disk are those of `formats.checkpoint`. Every function is
collective: all ranks call it alike. They wait for each other's files as long as it takes
(`engines.processes.start_waiting_group`).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import DamagedDataError, UserError, first_line
from mlpmem_ds.core.faults import is_failed_write
from mlpmem_ds.core.files import FileRecord, require_free_bytes, size_in_words
from mlpmem_ds.core.run_description import IDENTITY_FIELD
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.processes import gather_values, wait_for_all
from mlpmem_ds.formats.checkpoint import (
    Checkpoint,
    CheckpointManifest,
    checkpoint_name,
    fault_of_checkpoint,
    list_checkpoints,
    publish_checkpoint,
    read_checkpoint,
    record_and_flush,
    remove_checkpoint,
    remove_old_checkpoints,
    remove_unfinished,
    set_aside,
)
from mlpmem_ds.formats.trained_models import PROVENANCE_FIELD, deciding_provenance

_logger = logging.getLogger(__name__)


def save_checkpoint(
    root: Path,
    step: int,
    *,
    write: Callable[[str], Any],
    describe: Callable[[tuple[FileRecord, ...]], CheckpointManifest],
    num_bytes: int,
    keep: int,
    world: World,
    begin_copy: Callable[[Path], Collection[Path]] | None = None,
) -> Path:
    """Publish the checkpoint of `step` below `root`, remove all but the newest `keep`; where it is.

    Args:
        root: OUTPUT/checkpoints.
        step: optimizer steps done.
        write: writes this rank's files into the folder of this name below `root`.
        describe: the manifest of these files.
        num_bytes: that all ranks' files will take, about; tells whether the disk can hold them.
        keep: checkpoints kept.
        world: this rank.
        begin_copy: called on rank 0 with the published checkpoint, before older ones are removed; starts a
            copy in the background, and gives the checkpoints that must stay for it.

    Raises:
        UserError: the disk is full, or refuses the files for another reason; older checkpoints stay.
    """
    place = root / (checkpoint_name(step) + ".tmp")
    fault = _prepare_place(root, num_bytes) if world.is_first else None
    if fault := gather_values(fault, world)[0]:
        raise UserError(fault)
    try:
        write(place.name)
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError where a disk is full
        if not is_failed_write(error):  # ranks wait for each other in there, and GPUs compute
            raise
        _give_up(place, step, error)
    wait_for_all(world)
    seen = gather_values(_names_below(place), world)
    shares = gather_values(record_and_flush(place, share_of_names(seen, world.rank)), world)
    if world.is_first:
        try:
            records = sorted((record for share in shares for record in share), key=lambda record: record.name)
            publish_checkpoint(root, describe(tuple(records)))
        except OSError as error:
            _give_up(place, step, error)
        needed = () if begin_copy is None else begin_copy(root / checkpoint_name(step))
        remove_old_checkpoints(root, keep, needed=needed)
    wait_for_all(world)
    return root / checkpoint_name(step)


def _names_below(place: Path) -> list[str]:
    return [str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()]


def share_of_names(seen: Sequence[Collection[str]], rank: int) -> list[str]:
    """The files that a rank flushes and takes the checksums of.

    On a network file system a rank's listing may lack what others wrote in the last minute, but never what
    it wrote itself. So a file counts if any rank sees it, and goes to a rank that does.

    Args:
        seen: every rank's listing.
        rank: this one.
    """
    views = [frozenset(names) for names in seen]
    share = []
    for number, name in enumerate(sorted(frozenset().union(*views))):
        seers = [other for other, view in enumerate(views) if name in view]
        if seers[number % len(seers)] == rank:
            share.append(name)
    return share


def _prepare_place(root: Path, needed: int) -> str | None:
    """Make the directory, remove what a killed run left; why the disk cannot hold a checkpoint, or None."""
    root.mkdir(parents=True, exist_ok=True)
    remove_unfinished(root)
    remedy = "free some space and run the same command again, it continues from the newest checkpoint"
    try:
        require_free_bytes(root, needed, what="a checkpoint's files", remedy=remedy)
    except UserError as error:
        return str(error)
    return None


def _give_up(place: Path, step: int, error: Exception) -> None:
    """Raise a UserError with the remedy; what was half written goes."""
    shutil.rmtree(place, ignore_errors=True)
    reason = first_line(error)
    raise UserError(
        f"the checkpoint of step {step} could not be written below {place.parent} ({reason};"
        f" {size_in_words(shutil.disk_usage(place.parent).free)} are free there): free some space, or"
        " raise the quota or the limit on files' sizes (ulimit -f), and run the same command again, it"
        " continues from the newest checkpoint, which is untouched"
    ) from error


def find_checkpoint(
    root: Path, *, copies: Path | None, subject: Mapping[str, Any], world: World
) -> Checkpoint | None:
    """The newest checkpoint whose files match its manifest; None where none was ever saved.

    Damaged ones are set aside.

    Args:
        root: OUTPUT/checkpoints.
        copies: a second place of the same checkpoints, or None.
        subject: what is trained, and in `IDENTITY_FIELD` by which run; a checkpoint of another is refused.
            One that an earlier program saved may lack that field.
        world: this rank.

    Raises:
        UserError: there are checkpoints and none of them is whole, or it, or any of the copies, is of another
            training.
    """
    places = _open_places(root, copies, subject, world)
    candidates = sorted(
        (path for place in places for path in list_checkpoints(place)),
        key=lambda path: path.name,
        reverse=True,
    )
    # All go by the list of rank 0: another rank's may be older, and then they would wait for each other.
    candidates = gather_values(candidates, world)[0]
    for path in candidates:
        faults = gather_values(fault_of_checkpoint(path, rank=world.rank, size=world.size), world)
        fault = next(filter(None, faults), None)
        if fault is None:
            checkpoint = read_checkpoint(path)
            if fault := _fault_of_training(checkpoint, subject):
                raise UserError(fault)
            if path.parent == copies and world.is_first:
                _warn_of_unnamed_run(checkpoint, subject)
            return checkpoint
        if world.is_first:
            _logger.warning("%s: not resuming from %s, it is set aside as *.damaged", fault, path)
            set_aside(path)
    damaged = [path for place in places if place.is_dir() for path in place.glob("step-*.damaged")]
    damaged = gather_values(damaged, world)[0]
    if damaged:
        holders = " and ".join(sorted({str(path.parent) for path in damaged}))
        raise UserError(
            f"no checkpoint is whole ({len(damaged)} damaged in {holders}): restore one from a copy, or give"
            " --resume never to start anew, which removes them"
        )
    return None


def discard_checkpoints(root: Path, *, copies: Path | None, subject: Mapping[str, Any], world: World) -> None:
    """Remove all checkpoints of a training at both places, damaged ones too: for --resume never.

    The arguments are those of `find_checkpoint`.

    Raises:
        UserError: a copy is of another training; all are still there.
    """
    places = _open_places(root, copies, subject, world)
    if world.is_first:
        for place in places:
            for path in (*list_checkpoints(place), *place.glob("step-*.damaged")):
                _logger.warning("--resume never: discarding %s", path)
                remove_checkpoint(path)
    wait_for_all(world)


def _open_places(root: Path, copies: Path | None, subject: Mapping[str, Any], world: World) -> list[Path]:
    """Where this training's checkpoints are; what killed runs left half written there is removed.

    Raises:
        UserError: a copy is of another training, and its place would be cleared for this one's.
    """
    fault = None
    if copies is not None and world.is_first:
        faults = (_fault_of_copy(path, subject) for path in list_checkpoints(copies))
        fault = next(filter(None, faults), None)
    if fault := gather_values(fault, world)[0]:
        raise UserError(fault)
    places = [root] if copies is None else [root, copies]
    if world.is_first:
        for place in places:
            remove_unfinished(place)
    return places


def _fault_of_copy(path: Path, subject: Mapping[str, Any]) -> str | None:
    try:
        return _fault_of_training(read_checkpoint(path), subject)
    except DamagedDataError:
        return None  # it says nothing of its training, and is set aside when its turn comes


def _fault_of_training(checkpoint: Checkpoint, subject: Mapping[str, Any]) -> str | None:
    """That a checkpoint is of another training, or None."""
    saved = checkpoint.manifest.subject
    for name, value in subject.items():
        if _differs(name, value, saved):
            differs = "it has other flags or inputs" if name == IDENTITY_FIELD else f"its {name} differs"
            return (
                f"{checkpoint.path} is of another training ({differs}): give each training its own --output"
                " and --copy-to"
            )
    return None


def _differs(name: str, value: Any, saved: Mapping[str, Any]) -> bool:
    """Whether a field of a training's subject is not that of a checkpoint."""
    is_named = IDENTITY_FIELD in saved  # an earlier program did not write it
    if name == IDENTITY_FIELD:
        return is_named and saved[name] != value
    if name == PROVENANCE_FIELD:  # the identity has all of its flags and inputs
        return not is_named and deciding_provenance(saved.get(name, {})) != deciding_provenance(value)
    return bool(saved.get(name) != value)


def _warn_of_unnamed_run(checkpoint: Checkpoint, subject: Mapping[str, Any]) -> None:
    if IDENTITY_FIELD in subject and IDENTITY_FIELD not in checkpoint.manifest.subject:
        _logger.warning(
            "%s was saved by an earlier version and does not name its flags: if another training was copied"
            " there too, stop this one and give it its own --copy-to",
            checkpoint.path,
        )
