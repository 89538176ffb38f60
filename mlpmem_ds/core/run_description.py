"""What a run says of itself: run.json, and how its identity differs from what an output directory already holds."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import mlpmem_ds
from mlpmem_ds.core.config import plain_values
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World

_VERSIONED_PACKAGES = ("torch", "transformers", "deepspeed", "faiss-cpu", "webdataset", "zstandard", "numpy")


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
