"""`inspect_run`: which stages a run directory holds, whether each is complete, whether every checksum
holds."""

from __future__ import annotations

import json
import logging

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import publish_bytes
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.inspection.config import Config
from mlpmem_ds.stages.inspection.contents import StageState, read_run, some
from mlpmem_ds.stages.inspection.discard import discard
from mlpmem_ds.stages.inspection.watch import RunWatch, watch_run

_logger = logging.getLogger(__name__)


def run(config: Config, world: World) -> None:
    """Report on every stage, checkpoint and export below `config.run`.

    Raises:
        UserError: there is no stage, checkpoint or export of this project.
        DamagedDataError: something is damaged; the message lists it. (Not complete is not damaged.)
    """
    if not config.run.is_dir():
        raise UserError(f"{config.run} is not a directory: give a run directory, such as the demo's --run")
    if config.watch is not None or config.prometheus is not None:
        watch_run(config.run, seconds=config.watch, prometheus=config.prometheus)
        return
    if config.discard is not None:
        discard(config.run, config.discard, keep_dependents=config.keep_dependents, is_agreed=config.yes)
        return
    states = read_run(config.run, checksums=config.checksums, threads=config.threads)
    if not states:
        raise UserError(
            f"{config.run} holds no stage of this project (no identity.json below it): give a run directory"
        )
    for state in states:
        _logger.info(state.line())
        for note in (*_notes(state), *_broken_links(state, states)):
            _logger.warning("  %s", note)
        for fault in state.faults:
            _logger.warning("  %s", fault)
    if config.output is not None:
        progress = {stage.root: stage.to_json() for stage in RunWatch(config.run).look().stages}
        found = [state.to_json() | {"progress": progress.get(state.root)} for state in states]
        publish_bytes(config.output, (json.dumps(found, indent=1) + "\n").encode())
    if damaged := [state for state in states if state.faults]:
        shown = "; ".join(f"{state.name}: {state.faults[0]}: {state.remedy}" for state in damaged)
        raise DamagedDataError(
            f"faults: {sum(len(state.faults) for state in damaged)}, directories: {len(damaged)} ({shown})"
        )


def _notes(state: StageState) -> list[str]:
    notes = list(state.notes)
    if state.missing:
        notes.append(f"{len(state.missing):,} units have not been made: {some(state.missing)}")
    if not state.has_manifest and state.kind == "stage":
        notes.append(f"{state.name} is not complete: run its stage again with the same flags, it continues")
    return notes


def _broken_links(state: StageState, states: list[StageState]) -> list[str]:
    """Inputs of a stage that the run directory holds with other content: they were made again since. One that
    is being made is not spoken of here."""
    hashes = {
        other.format.removeprefix("mlpmem-"): {one.sha256 for one in states if one.format == other.format}
        for other in states
        if other.has_manifest
    }
    return [
        f"{state.name}: its {name} is not the one in this run directory (was it made again?)"
        for name, sha256 in state.inputs.items()
        if state.kind == "stage" and name in hashes and sha256 not in hashes[name]
    ]
