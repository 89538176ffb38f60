"""What a run says of itself: identity.json, which the next run must equal; run.json, for people."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import platform
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import mlpmem_ds
from mlpmem_ds.core.config import flag_name, plain_values
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import (
    content_hash,
    publish_json,
    read_json_object,
    read_sealed_json,
    sha256_of_file,
)
from mlpmem_ds.core.world import World

IDENTITY_FIELD = "identity"
"""the field of a unit's record, and of a checkpoint's subject, that holds the content hash of the identity
that it was made for"""
_WRITTEN_FIRST = {"identity.json", "run.json", "log.jsonl", "done"}
_MAX_SHOWN = 6  # differences between two runs
_logger = logging.getLogger(__name__)
VERSIONED_PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "faiss-cpu",
    "faiss-gpu",
    "faiss-gpu-cu11",
    "faiss-gpu-cu12",
    "flash-attn",
    "mpi4py",
    "webdataset",
    "zstandard",
    "numpy",
)
"""distributions whose versions a run notes, where they are installed"""


def settle_identity(output: Path, identity: Mapping[str, Any], *, defaults: Mapping[str, Any]) -> None:
    """Write an output's identity, or compare it with the one in it; a damaged one is written anew where the
    units' records say that it was this.

    Args:
        output: the stage's directory; made where it does not exist.
        identity: of this run; its `config` holds flags that differ from their defaults.
        defaults: flag → default.

    Raises:
        UserError: the directory holds a run with another identity; says in what it differs.
        DamagedDataError: its identity cannot be read, and no unit's record says that it is this one.
    """
    path = output / "identity.json"
    if path.is_file() or has_records(output):
        try:
            former = read_sealed_json(path)
        except DamagedDataError as error:
            if not _was_made_for(output, identity):
                remedy = f"restore it from a copy, or remove {output} to start anew"
                raise DamagedDataError(f"{error} (no unit's record names this run: {remedy})") from error
            _logger.warning("%s: writing it anew, the units' records say that it is this run's", error)
        else:
            refuse_other_run(output, former, identity, defaults=defaults)
            return
    output.mkdir(parents=True, exist_ok=True)
    publish_json(path, identity, seal=True)


def resolved_at_start(output: Path, flag: str) -> Any:
    """What a stage made of a flag (of `auto`) when the output was first started, maybe on another machine.

    None where no run was begun there, or its identity cannot be read, which `settle_identity` judges.
    """
    with contextlib.suppress(DamagedDataError):
        return read_sealed_json(output / "identity.json").get("config", {}).get(flag)
    return None


def reason_of_start(now: str) -> str:
    """Why a choice is the one of `resolved_at_start` and not what it would be now, in words."""
    return f"chosen when this run was first started; now it would be {now}"


def has_records(output: Path) -> bool:
    """Whether units were finished: then a run was begun, whether or not its identity can be read."""
    return next(_record_paths(output), None) is not None


def _record_paths(output: Path) -> Iterator[Path]:
    """Some units' records: those of the folder `done`, then those of the folders in it."""
    folders = [output / "done"]
    while folders:
        with contextlib.suppress(FileNotFoundError), os.scandir(folders.pop(0)) as entries:
            for entry in entries:
                if entry.name.endswith(".json") and not entry.name.startswith("."):
                    yield Path(entry.path)
                elif entry.is_dir():
                    folders.append(Path(entry.path))


def _was_made_for(output: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the units were made for this identity, or none was begun."""
    for path in _record_paths(output):
        with contextlib.suppress(DamagedDataError):
            return bool(read_sealed_json(path).get(IDENTITY_FIELD) == content_hash(identity))
    return {
        entry.name for entry in output.iterdir() if not entry.name.startswith((".", "log-", "traceback-"))
    } <= _WRITTEN_FIRST


def refuse_other_run(
    output: Path, former: Mapping[str, Any], identity: Mapping[str, Any], *, defaults: Mapping[str, Any]
) -> None:
    """Compare two identities of a stage's output; a flag that one of them lacks has its default.

    Raises:
        UserError: they differ; says in what.
    """
    old, new = ({**run, "config": {**defaults, **run.get("config", {})}} for run in (former, identity))
    differences = [
        f"{name} was {_shown(was)}, now {_shown(now)}" for name, was, now in _differences(old, new)
    ]
    if differences:
        if (more := len(differences) - _MAX_SHOWN) > 0:  # each input may follow from one flag
            differences[_MAX_SHOWN:] = [f"and {more} more"]
        raise UserError(
            f"--output {output} already holds another run ({'; '.join(differences)}): "
            "choose another --output, or remove it to start anew"
        )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, old value, new value); of a flag the name is as it is written."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(set(old) | set(new)):
            inner = flag_name(key) if name == "config" else f"{name}.{key}".lstrip(".")
            yield from _differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield name, old, new


def _shown(value: Any) -> str:
    return "none" if value is None else repr(value)


def describe_run(config: Any, world: World) -> dict[str, Any]:
    """The content of run.json: flags, versions, machine and date; for people."""
    versions = {"mlpmem_ds": mlpmem_ds.__version__, "python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "config": plain_values(config),
        "versions": versions,
        "world": world.size,
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def read_description(root: Path) -> dict[str, Any]:
    """run.json of a stage's latest start, as `describe_run` gives it; {} where there is none."""
    path = root / "run.json"
    return read_json_object(path) if path.is_file() else {}


def flags_of_run(root: Path) -> Mapping[str, Any]:
    """The flags of a stage's latest start; {} where it does not say them."""
    flags: Mapping[str, Any] = read_description(root).get("config", {})
    return flags


def find_input(root: Path, name: str, sha256: str | None, *, given: Path | None = None) -> Path | None:
    """The directory that a stage was made from: `given`, as the stage's flags name it, or next to the stage.

    Args:
        root: the stage's directory.
        name: of the input, as the flag is called.
        sha256: of the input's manifest, as the stage or what it wrote gives it; None = not known.
        given: where it may be too.

    Returns:
        None unless the manifest there has this hash.
    """
    for path in (given, flags_of_run(root).get(name), root.resolve().parent / name):
        if not path or not (Path(path) / "manifest.json").is_file():
            continue
        if sha256_of_file(Path(path) / "manifest.json") == sha256:
            return Path(path)
    return None


def check_output(output: Path, *, stage: str, leftovers: Collection[str] = ()) -> bool:
    """Whether a run was begun there; for callers that do long work before `open_stage`.

    `leftovers` are names that may be there before: what a run that was given up has left for the next.

    Raises:
        UserError: it is a file, is not UTF-8, or holds something that is no stage's.
    """
    if not is_utf8(str(output)):
        raise UserError(
            f"--output {output} is not UTF-8, and libraries write to no such path: choose another name, or go"
            " into its parent directory first"
        )
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: choose a directory")
    # The first name that shows is enough: large directories are not listed by every rank. The identity is
    # looked for after it, because other ranks are starting too, and write that first.
    shows_a_name = _shows_a_name(output, leftovers)
    if (output / "identity.json").is_file() or has_records(output):
        _refuse_other_format(output, stage)
        return True
    if shows_a_name:
        raise UserError(
            f"--output {output} is not empty and holds no {stage}: choose a new directory or empty it"
        )
    return False


def withdraw(output: Path) -> None:
    """Remove what a start has written that was refused before it made anything, so that a wrong flag or input
    leaves the disk as it was. What other starts have made stays, and so do hidden files, of which the next
    start can make use.

    Only where no other process is at this output.
    """
    done = output / "done"
    visible = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    logs = {name for name in visible if name.startswith("log") and name.endswith(".jsonl")}
    if (
        "identity.json" not in visible
        or visible - logs - _WRITTEN_FIRST
        or (done.is_dir() and any(done.iterdir()))
    ):
        return
    for name in (*logs, "run.json", "identity.json"):  # the identity last: until then it is a run's output
        (output / name).unlink(missing_ok=True)
    for folder in (done, output):
        with contextlib.suppress(OSError):  # missing, or not empty
            folder.rmdir()


def is_utf8(text: str) -> bool:
    """Whether a word of the command line, or a file's name, was UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_other_format(output: Path, stage: str) -> None:
    with contextlib.suppress(
        DamagedDataError, FileNotFoundError
    ):  # what is damaged is judged with the whole identity
        found = read_sealed_json(output / "identity.json")
        if found.get("format") != f"mlpmem-{stage}":
            raise UserError(
                f"--output {output} holds {found.get('format')}, not mlpmem-{stage}: choose another directory"
            )


def _shows_a_name(folder: Path, leftovers: Collection[str]) -> bool:
    """Whether a directory has an entry that is not hidden, and none of `leftovers`."""
    try:
        with os.scandir(folder) as entries:
            return any(not entry.name.startswith(".") and entry.name not in leftovers for entry in entries)
    except FileNotFoundError:
        return False
