"""`export_datastore`: keys and targets → the Arrow files that the authors' training reads.

OUTPUT/datastore.arrow   keys: the memory's inputs as float16, which their memory reads; vals: the values
OUTPUT/targets.arrow     a row for each position, by falling probability; row i of both is position i
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import require_free_bytes
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.temporaries import written_bytes
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.verified_inputs import verify_inputs
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.arrow_library import import_arrow
from mlpmem_ds.formats.arrow_tables import ArrowManifest, write_datastore, write_rows
from mlpmem_ds.formats.keys import Keys, bfloat16_values, open_keys
from mlpmem_ds.formats.targets import Targets, open_targets
from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.stages.exchange.config import ExportConfig

_ROWS = 4096


def run(config: ExportConfig, world: World) -> None:
    """Write the files; each appears whole. Ranks take one each.

    Raises:
        UserError: inputs that do not belong together or lack what is asked for, or pyarrow is not installed.
    """
    keys = open_keys(config.keys)
    targets = None if config.targets is None else open_targets(config.targets)
    if targets is not None and targets.keys_sha256 != keys.sha256:
        raise UserError(
            f"--targets {config.targets} are not of --keys {config.keys}: give those that they were made from"
        )
    if config.datastore and keys.input_codec == "none" and keys.codec != "raw":
        raise UserError(
            f"--keys {config.keys} hold int8 codes and no memory inputs: extract them with --input-codec"
            " bf16, or give --no-datastore"
        )
    import_arrow("lib", path=config.output)
    width = (keys.input_size or keys.dim) if config.datastore else 0
    needed = (2 * width + 4) * keys.num_positions if config.datastore else 0
    needed += 0 if targets is None else 16 * keys.num_positions + 6 * targets.manifest.entries
    needed -= written_bytes(config.output, ".arrow")
    require_free_bytes(config.output, needed, what="the Arrow files")
    inputs = {"keys": keys.sha256, **({} if targets is None else {"targets": targets.sha256})}
    stage = open_stage(
        config.output,
        stage=ArrowManifest.FORMAT,
        version=ArrowManifest.VERSION,
        config=config,
        inputs=inputs,
        world=world,
    )
    vectors = ("inputs", "input_scales") if keys.input_size else ("keys",)
    arrays = ("values", *(vectors if config.datastore else ()))
    verify_inputs(stage, keys, keys.array_files(*arrays), label="keys")
    units = [*(["datastore"] if config.datastore else []), *(["targets"] if targets is not None else [])]
    progress = Progress(len(units) * keys.num_positions, label="rows", unit="rows", world=world)

    def write(unit: str, writer: UnitWriter) -> dict[str, Any]:
        with writer.file(f"{unit}.arrow") as path:
            if unit == "datastore":
                rows = write_datastore(path, _keys_of(keys, progress), width)
            else:
                assert targets is not None
                rows = write_rows(path, _rows_of(keys, targets, progress))
        return {"rows": rows}

    stage.run_units(units, write)
    progress.close()
    stage.complete(units, lambda: ArrowManifest(num_positions=keys.num_positions, width=width))


def _keys_of(keys: Keys, progress: Progress) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, keys.num_positions, _ROWS):
        stop = min(start + _ROWS, keys.num_positions)
        stored = keys.input_codec != "none"
        vectors_nD = (
            bfloat16_values(keys.read_inputs(start, stop)) if stored else keys.read("keys", start, stop)
        )
        with np.errstate(over="ignore"):
            halves_nD = vectors_nD.astype(np.float16)
        if not np.isfinite(halves_nD).all():
            raise UserError(
                f"positions {start} to {stop}: a number is beyond float16's 65,504, which the Arrow format"
                " cannot hold"
            )
        yield halves_nD, keys.read("values", start, stop)
        progress.advance(stop - start)


def _rows_of(keys: Keys, targets: Targets, progress: Progress) -> Iterator[tuple[SparseRows, np.ndarray]]:
    for start in range(0, keys.num_positions, _ROWS):
        stop = min(start + _ROWS, keys.num_positions)
        yield targets.read(start, stop), keys.read("values", start, stop)
        progress.advance(stop - start)
