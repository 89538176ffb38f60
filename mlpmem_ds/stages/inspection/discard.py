"""Part of `inspect_run`: `--discard`, which throws away what is broken and what was made from it, and no
more.

The order is such that a crash at any moment leaves directories that the same stage commands continue, and
that the same --discard goes on with: what was made from the unit goes before the unit, the last of the
pipeline first; of a directory its manifest first and its identity last; of a unit its record before its
files.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.claims import ClaimWatch, claim, has_ended, is_of_this_machine
from mlpmem_ds.core.directories import left_of_replacement, remove_former
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import read_sealed_json, size_in_words
from mlpmem_ds.core.log import EventLog, is_event, read_events, read_json_lines
from mlpmem_ds.core.objects.contents import CHECKPOINTS
from mlpmem_ds.core.temporaries import time_of_file_system
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.inspection.contents import EXPORT_FILE, some
from mlpmem_ds.stages.inspection.origins import Made, dependents_of, read_made

_logger = logging.getLogger(__name__)
_SECONDS_UNTIL_GONE = 600.0
"""without a line in the log, of a process of another host"""
_SECONDS_OF_CLAIMS = 70.0
_SECONDS_BETWEEN_LOOKS = 2.0
_ENDS = ("finished", "ended", "stopped")


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """A unit's record (one that was put aside because its files are damaged, too) and the files in it."""

    name: str
    record: Path
    files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files if path.is_file())


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What goes: units of `made`, or all of it where `units` is None, and whole directories before."""

    made: Made
    units: tuple[_Unit, ...] | None
    dependents: tuple[Made, ...]
    stays: tuple[Made, ...]

    @property
    def places(self) -> tuple[Made, ...]:
        """The directories in which no process may be at work; of a checkpoint that of its training."""
        made = self.made
        if made.root.parent.name == CHECKPOINTS:
            made = _nameless(made.root.parents[1], Path(made.name).parent.parent.as_posix())
        return (made, *self.dependents)

    @property
    def commands_of(self) -> str:
        """The directories whose commands make it again."""
        return ", ".join(made.name for made in (self.made, *reversed(self.dependents)))


def discard(run: Path, name: str, *, keep_dependents: bool, is_agreed: bool) -> None:
    """Say what goes with a unit, a stage, an export or a checkpoint; remove it if that is agreed to.

    Args:
        run: the run directory.
        name: `STAGE/UNIT`, a unit's name that no other stage has, or a directory's path below `run`.
        keep_dependents: leave what was made from it; the units' records are put aside, and the stage refuses
            other bytes than theirs.
        is_agreed: do it.

    Raises:
        UserError: there is no such unit, or several; or what would go is a link to another place; or a
            process may be at work there.
    """
    plan = _plan(run, name, keep_dependents=keep_dependents)
    for made in (plan.made, *plan.dependents):
        _refuse_link(run, made)
    for line in _lines_of(plan, keep_dependents=keep_dependents):
        _logger.info(line)
    if not is_agreed:
        _logger.info("nothing was removed: the same command with --yes does it")
        return
    watch = ClaimWatch()
    _refuse_live_processes(plan.places, watch)
    for made in plan.dependents:
        _remove_directory(made.root)
    if plan.units is None:
        _remove_directory(plan.made.root)
    else:
        _remove_units(plan.made.root, plan.units, watch, keeps_records=keep_dependents)
    _logger.info("removed. To make it again, run the commands of: %s", plan.commands_of)


# -- what goes


def _plan(run: Path, name: str, *, keep_dependents: bool) -> _Plan:
    everything = read_made(run)
    made, units = _find(run, name.strip("/"), everything, keep_dependents=keep_dependents)
    dependents = [] if keep_dependents else dependents_of(made, everything)
    gone = {made.root, *(one.root for one in dependents)}
    whole = gone if units is None else gone - {made.root}  # what lies in one of these goes with it
    return _Plan(
        made=made,
        units=units,
        dependents=tuple(one for one in dependents if not whole & set(one.root.parents)),
        stays=tuple(one for one in everything if one.root not in gone and not whole & set(one.root.parents)),
    )


def _find(
    run: Path, name: str, everything: Sequence[Made], *, keep_dependents: bool
) -> tuple[Made, tuple[_Unit, ...] | None]:
    for made in everything:
        if name == made.name or (run / name).resolve() == made.root:
            if keep_dependents and (made.root / "done").is_dir():
                return made, tuple(_all_units(made.root))
            return made, None
    checkpoint = (run / name).resolve()
    is_checkpoint = (checkpoint / "manifest.json").is_file() and checkpoint.parent.name == CHECKPOINTS
    if is_checkpoint and ".." not in Path(name).parts:  # of another run: its processes are not looked for
        return _nameless(checkpoint, name), None
    folder, _, unit = name.rpartition("/")
    stages = [made for made in everything if not folder or folder == made.name]
    found = [(made, one) for made in stages for one in _units_named(made.root, unit)]
    if len({made.root for made, _ in found}) > 1:
        raise UserError(f"--discard {name}: {some([f'{made.name}/{unit}' for made, _ in found])}: say which")
    if not found:
        _refuse_left_alone(run / name)
        raise UserError(f"--discard {name}: {run} holds no such unit{_similar(name, everything)}")
    made, one = found[0]
    if keep_dependents or not _is_read_here(made.root, unit):
        return made, (one,)
    # It goes last: until then the same --discard finds it.
    return made, (*(other for other in _all_units(made.root) if other.name != unit), one)


def _refuse_left_alone(path: Path) -> None:
    """
    Raises:
        UserError: a replacement of this directory was cut off, and nothing has its name.
    """
    left = left_of_replacement(path) if path.name else []  # the folder "." has no name
    if left:
        names = some([one.name for one in left])
        is_former = any(one.name.endswith(".former") for one in left)
        back = f"the command that writes {path.name} puts it back, and " if is_former else ""
        what = "as it was before a replacement that was cut off" if is_former else "what is left of a removal"
        raise UserError(
            f"--discard: of {path} there is only {names} in {path.parent}, {what}: {back}to remove it give"
            f" rm -r {shlex.join(str(one) for one in left)}"
        )


def _nameless(root: Path, name: str) -> Made:
    """A directory that nothing is known to be made from, such as a checkpoint."""
    return Made(root=root, name=name, hashes=frozenset(), inputs=frozenset(), paths=frozenset())


def _similar(name: str, everything: Sequence[Made]) -> str:
    names = [made.name for made in everything]
    names += [f"{made.name}/{unit}" for made in everything for unit in _unit_names(made.root)]
    similar = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return f": did you mean {' or '.join(similar)}?" if similar else ", and no stage of that name"


def _unit_names(root: Path) -> Iterator[str]:
    for path in sorted((root / "done").rglob("*")):
        if path.suffix == ".json" and not path.name.startswith("."):
            yield path.stem
        elif path.suffix == ".former" and path.name.startswith("."):
            yield path.stem[1:]


def _all_units(root: Path) -> Iterator[_Unit]:
    for name in dict.fromkeys(_unit_names(root)):
        yield from _units_named(root, name)


def _units_named(root: Path, name: str) -> Iterator[_Unit]:
    """The unit of this name, if it has a record, or one that was put aside."""
    escaped = glob.escape(name)
    records = [*(root / "done").rglob(f"{escaped}.json"), *(root / "done").rglob(f".{escaped}.former")]
    if records:
        try:
            names = [str(file["name"]) for file in read_sealed_json(records[0])["files"]]
        except (DamagedDataError, KeyError, TypeError):  # then its stage makes it again, over its files
            names = []
        paths = (root / one for one in names if root.resolve() in (root / one).resolve().parents)
        yield _Unit(name=name, record=records[0].parent / f"{name}.json", files=tuple(paths))


def _is_read_here(root: Path, unit: str) -> bool:
    """Whether other units of the stage are made from it; also where the log does not say."""
    made = [event for event in read_events(root / "log.jsonl") if event.get("unit") == unit]
    return not made or bool(made[-1].get("read_here"))


# -- in words


def _lines_of(plan: _Plan, *, keep_dependents: bool) -> Iterator[str]:
    made = plan.made
    if plan.units is None:
        yield f"goes: {made.name}, {_size_of(made.root)}"
    else:
        names = some([unit.name for unit in plan.units])
        num_files = sum(len(unit.files) for unit in plan.units)
        size = size_in_words(sum(unit.num_bytes for unit in plan.units))
        yield f"goes: of {made.name} the units {names}: {num_files:,} files, {size}"
        if len(plan.units) > 1 and not keep_dependents:
            yield "      (all units of the directory are made from the one that was named)"
    for dependent in reversed(plan.dependents):
        yield f"goes: {dependent.name}, made from it, {_size_of(dependent.root)}"
    if keep_dependents:
        yield "stays: what was made from it; the units must come out with the same bytes"
    if plan.stays:
        yield f"stays: {', '.join(made.name for made in plan.stays)}"


def _size_of(root: Path) -> str:
    sizes = [
        os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(root) for name in names
    ]
    return f"the whole directory: {len(sizes):,} files, {size_in_words(sum(sizes))}"


def _refuse_link(run: Path, made: Made) -> None:
    """
    Raises:
        UserError: a directory lies elsewhere, and the run directory has a link to it.
    """
    below = run.resolve()
    place = below if made.root == below else below / made.name
    if place != made.root:
        raise UserError(
            f"{made.name} is not in {run}: a link leads to {made.root}, which other runs may read. To discard"
            " that, give the run directory in which it lies; to make it anew here, remove the link"
        )


# -- who is at work


def _refuse_live_processes(places: Sequence[Made], watch: ClaimWatch) -> None:
    """
    Raises:
        UserError: a process is at work in one of the directories, or may be.
    """
    for made in places:
        _refuse_started(made)
    start = time.monotonic()
    pending = [path for made in places for path in _claims(made.root)]
    while pending:
        states = {path: watch.look(path) for path in pending}
        if held := [path for path, state in states.items() if state == "held"]:
            with contextlib.suppress(OSError):
                owner = held[0].read_text(encoding="utf-8", errors="replace")
                raise UserError(
                    f"{held[0]} is held by a live process (host, boot, process id, its start: {owner}): end"
                    " its command, and discard then"
                )
        pending = [path for path, state in states.items() if state == "unknown"]
        if pending and time.monotonic() - start > _SECONDS_OF_CLAIMS:
            raise UserError(
                f"{some([str(path) for path in pending])}: may be held; discard again in a minute"
            )
        if pending:
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _claims(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        yield from (Path(folder) / name for name in names if name.startswith(".") and name.endswith(".claim"))


def _refuse_started(made: Made) -> None:
    """Look at the processes that began the stage and did not say that they ended."""
    root = made.root
    is_complete = (root / "manifest.json").is_file()
    for path in root.glob("log*.jsonl"):
        last: dict[int, dict[str, Any]] = {}
        for event in filter(is_event, read_json_lines(path)):
            if event["event"] == "started":
                last[event["rank"]] = event
            elif event["event"] in _ENDS:
                last.pop(event["rank"], None)
        for rank, event in last.items():
            process = str(event.get("process", ""))
            if has_ended(process):
                continue
            silence = time_of_file_system(root) - path.stat().st_mtime
            if is_of_this_machine(process):
                raise UserError(
                    f"rank {rank} of {made.name} is at work (host, boot, process id, its start: {process}):"
                    " end its command, and discard then"
                )
            if silence < _SECONDS_UNTIL_GONE and not is_complete:
                raise UserError(
                    f"rank {rank} of {made.name} (host, boot, process id, its start: {process})"
                    f" gave a sign of life {silence:.0f} s ago and did not say that it ended: end its"
                    f" command, or wait until {_SECONDS_UNTIL_GONE:.0f} s have passed"
                )


# -- removing


def _remove_directory(root: Path) -> None:
    """Of a directory the manifest first, so that no reader takes it for complete, then the records, and the
    identity last, so that the same --discard finds it again; before it a predecessor that would be put
    back."""
    remove_former(root)
    for name in ("manifest.json", EXPORT_FILE):
        (root / name).unlink(missing_ok=True)
    shutil.rmtree(root / "done", ignore_errors=True)
    for entry in list(os.scandir(root)):
        if entry.name == "identity.json":
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
    (root / "identity.json").unlink(missing_ok=True)
    root.rmdir()


def _remove_units(root: Path, units: Sequence[_Unit], watch: ClaimWatch, *, keeps_records: bool) -> None:
    """The manifest, then of each unit its record and its files. No rank begins one meanwhile, or writes the
    manifest: this process has the claims."""
    with claim(root / ".manifest.claim", watch=watch) as is_mine:
        if not is_mine:
            raise UserError(f"a process is about to complete {root}: discard again when it has")
        (root / "manifest.json").unlink(missing_ok=True)
        for unit in units:
            with claim(unit.record.with_name(f".{unit.name}.claim"), watch=watch) as is_mine:
                if not is_mine:
                    raise UserError(f"a process is at unit {unit.name} of {root}: end its command first")
                former = unit.record.with_name(f".{unit.name}.former")
                if not keeps_records:
                    former.unlink(missing_ok=True)
                    unit.record.unlink(missing_ok=True)
                elif unit.record.is_file():
                    os.replace(unit.record, former)
                for path in unit.files:
                    path.unlink(missing_ok=True)
    EventLog(root / "log.jsonl", World()).write("discarded", units=[unit.name for unit in units])
