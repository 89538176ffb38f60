"""What a run says of itself: identity.json, and how it differs from the one that is there; run.json, for
people."""

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
from mlpmem_ds.core.config import plain_values
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import content_hash, publish_json, read_json, read_sealed_json
from mlpmem_ds.core.world import World

IDENTITY_FIELD = "identity"
"""the field of a unit's record that holds the content hash of the identity that the unit was made for"""
_WRITTEN_FIRST = {"identity.json", "run.json", "log.jsonl", "done"}
_logger = logging.getLogger(__name__)
_VERSIONED_PACKAGES = ("torch", "transformers", "deepspeed", "faiss-cpu", "webdataset", "zstandard", "numpy")


def settle_identity(
    output: Path, wanted: Mapping[str, Any], *, without_effect: Collection[str] = ()
) -> tuple[dict[str, Any], bool]:
    """Write an output's identity, or compare it with the one that is there; damaged, it is written anew where
    it is proved.

    Args:
        output: the stage's directory; made where it is not there.
        wanted: the identity of this run.
        without_effect: flags that decide nothing beside the others: they are not compared.

    Returns:
        the identity as it stands in the directory, and whether it is sealed (those of earlier releases are
        not).

    Raises:
        UserError: the directory holds a run with another identity; says in what it differs.
        DamagedDataError: its identity cannot be read, and no unit's record says that it is this one.
    """
    path = output / "identity.json"
    if path.is_file() or has_records(output):
        try:
            found, is_sealed = read_sealed_json(path)
        except DamagedDataError as error:
            if not _was_made_for(output, wanted):
                remedy = f"restore it from a copy, or remove {output} to start anew"
                raise DamagedDataError(f"{error} (no unit's record names this run: {remedy})") from error
            _logger.warning("%s: writing it anew, the units' records say that it is this run's", error)
        else:
            refuse_other_run(output, _without(found, without_effect), _without(wanted, without_effect))
            return found, is_sealed
    output.mkdir(parents=True, exist_ok=True)
    publish_json(path, wanted, seal=True)
    return dict(wanted), True


def has_records(output: Path) -> bool:
    """Whether units were finished there: then a run was begun, whether or not its identity is still there."""
    return any((output / "done").glob("[!.]*.json"))


def _was_made_for(output: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether the units there were made for this identity, or none was begun."""
    for path in sorted((output / "done").glob("[!.]*.json")):
        with contextlib.suppress(DamagedDataError):
            return bool(read_json(path).get(IDENTITY_FIELD) == content_hash(wanted))
    return {entry.name for entry in output.iterdir() if not entry.name.startswith(".")} <= _WRITTEN_FIRST


def _without(identity: Any, names: Collection[str]) -> Any:
    if not names or not isinstance(identity, Mapping) or not isinstance(identity.get("config"), Mapping):
        return identity
    config = {name: value for name, value in identity["config"].items() if name not in names}
    return {**identity, "config": config}


def refuse_other_run(output: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare two identities of a stage's output.

    Raises:
        UserError: they differ; says in what.
    """
    differences = [f"{name} was {old!r}, now {new!r}" for name, old, new in _differences(found, wanted)]
    if differences:
        raise UserError(
            f"--output {output} already holds another run ({'; '.join(differences)}): "
            "choose another --output, or remove it to start anew"
        )


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in sorted(set(found) | set(wanted)):
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
    elif found != wanted:
        yield name, found, wanted


def describe_run(config: Any, world: World) -> dict[str, Any]:
    """The content of run.json: flags, versions, machine and date; for people."""
    versions = {"mlpmem_ds": mlpmem_ds.__version__, "python": platform.python_version()}
    for package in _VERSIONED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "config": plain_values(config),
        "versions": versions,
        "world": world.size,
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
