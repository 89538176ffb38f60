"""`extract_keys`: corpus → keys. Run the frozen base once; keep each position's key, value, log-probability
and memory input.

Phase 1 fits the int8 codec on a sample of windows (one unit); phase 2 is one unit for each block of
positions. Afterwards, if asked, an audit compares the stored keys' targets with those of the raw keys.

Keys may come from another model than the memory's inputs (the paper takes them from a larger one). The *base*
of the memory is then the model of the inputs, and the log-probabilities are that base's.

D width of the base, E size of a stored key, I input size, n positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any

from mlpmem_ds.core.blocks import Block, deal
from mlpmem_ds.core.config import default_of
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.verified_inputs import verify_inputs
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.ranks import Ranks
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.keys import (
    Codec,
    CodecManifest,
    KeysManifest,
    file_name,
    open_keys,
    read_codec,
)
from mlpmem_ds.stages.keys.audit import AuditSettings, run_audit
from mlpmem_ds.stages.keys.codec import read_sample, write_codec
from mlpmem_ds.stages.keys.config import Config
from mlpmem_ds.stages.keys.inputs import Bases, ExtractionInputs, describe_keys, open_inputs
from mlpmem_ds.stages.keys.plan import (
    UNIT_POSITIONS,
    PositionBytes,
    blocks_of_units,
    bytes_of_position,
    require_disk,
)
from mlpmem_ds.stages.keys.readings import Rows, UnitReader, are_read_ahead, read_block
from mlpmem_ds.stages.keys.unit_files import unit_files
from mlpmem_ds.stages.stage_ranks import open_stage_ranks

__all__ = ["Config", "run"]

_CODEC_UNIT = "codec"
_POSITION_BYTES = 8  # of a row, where not all positions have one


def run(config: Config, world: World) -> None:
    """Write the key directory; see formats/README.md."""
    with open_stage_ranks(config, world, stage=KeysManifest.FORMAT) as ranks:
        _extract(config, world, ranks)


def _extract(config: Config, world: World, ranks: Ranks) -> None:
    inputs = open_inputs(config, world)
    corpus, bases, dim = inputs.corpus, inputs.bases, inputs.dim
    each = bytes_of_position(
        codec=config.codec,
        dim=dim,
        input_codec=config.input_codec,
        input_size=bases.input_width,
        value_bytes=corpus.dtype.itemsize + (_POSITION_BYTES if corpus.has_answers else 0),
    )
    codec_name = "int8" if config.codec == "int8" else config.raw_dtype
    if world.is_first:
        require_disk(
            config.output, each, corpus.num_counted, codec=codec_name, input_codec=config.input_codec
        )
    directory = open_stage(
        config.output,
        stage=KeysManifest.FORMAT,
        version=KeysManifest.VERSION,
        config=config,
        world=world,
        inputs=inputs.hashes,
        resolved=_resolved(config, inputs),
        dealer=ranks,
    )

    verify_inputs(directory, corpus, corpus.stream_files, label="corpus")
    phase_1 = [_CODEC_UNIT] if config.codec == "int8" else []

    def fit(_: str, writer: UnitWriter) -> dict[str, Any]:
        states_ND = read_sample(bases.key_source, corpus, bases.key_point, config.fit_positions, config.seed)
        return write_codec(states_ND, dim, config.seed, writer)

    directory.run_phase(phase_1, fit)
    raw = Codec(mean_D=None, rotation_DE=None, scale=1.0, raw_dtype=config.raw_dtype)
    codec = read_codec(config.output) if phase_1 else raw

    blocks = blocks_of_units(corpus.num_counted, inputs.unit_positions)
    missing = frozenset(directory.missing_units(list(blocks)))
    to_do = [unit for unit in deal(list(blocks), world.rank, world.size) if unit in missing]
    meter = _Meter(sum(blocks[unit].size for unit in to_do), each, world)
    following = dict(pairwise(to_do))

    def next_block(unit: str) -> Block | None:
        after = directory.next_unit(following.get(unit))
        return blocks[after] if after in missing else None

    def extract(unit: str, writer: UnitWriter) -> dict[str, Any]:
        then = partial(next_block, unit)
        return _extract_unit(corpus, reader, blocks[unit], then, inputs.unit_positions, writer, meter)

    read = partial(read_block, config, corpus, bases, codec)
    with UnitReader(read, ahead=are_read_ahead(bases)) as reader:
        directory.run_units(list(blocks), extract)
    meter.close(directory)

    def describe() -> KeysManifest:
        return describe_keys(config, inputs, _describe_codec(config, inputs, codec, directory, list(blocks)))

    def audit() -> None:
        if config.audit is not None:
            _audit(config, config.audit, corpus, bases, world)

    directory.complete([*phase_1, *blocks], describe, afterwards=audit)


def _describe_codec(
    config: Config, inputs: ExtractionInputs, codec: Codec, directory: StageDirectory, units: Sequence[str]
) -> CodecManifest:
    """How the keys are stored, from the summaries of the units."""
    clipped = sum(summary["clipped"] for summary in directory.summaries(units))
    is_fitted = config.codec == "int8"
    return CodecManifest(
        name=config.codec,
        dim=inputs.dim,
        scale=codec.scale,
        raw_dtype=None if is_fitted else config.raw_dtype,
        energy_kept=directory.summaries([_CODEC_UNIT])[0]["energy_kept"] if is_fitted else 1.0,
        clipped_share=clipped / (inputs.corpus.num_counted * inputs.dim),
        massive_dimensions=codec.massive,
    )


def _resolved(config: Config, inputs: ExtractionInputs) -> dict[str, Any]:
    """What decides the keys in place of the flags; one that the codec does not use has its default."""
    bases, layer = inputs.bases, inputs.bases.input_point.layer
    unused = ("raw_dtype",) if config.codec == "int8" else ("fit_positions", "seed")
    return {
        "dim": inputs.dim,
        # The unit of most directories goes without saying, so that it is as if no flag were given.
        "unit_positions": None if inputs.unit_positions == UNIT_POSITIONS else inputs.unit_positions,
        "dtype": bases.key_source.dtype_name,
        "attention": bases.attention,
        "key_layer": bases.key_point.layer,
        # One layer is a number, several are a list.
        "input_layer": [*earlier, layer] if (earlier := bases.input_point.earlier) else layer,
        "input_point": bases.input_point.point,
    } | {
        name: default_of(Config, name) if name in unused else getattr(config, name)
        for name in ("raw_dtype", "fit_positions", "seed")
    }


class _Meter:
    """The progress line: rate and time left, bytes written, and the share of the time outside the forward
    pass."""

    def __init__(self, num_positions: int, each: PositionBytes, world: World) -> None:
        self._progress = Progress(num_positions, label="keys", unit="tokens", world=world)
        self._bytes_each = each.total
        self._positions, self._forward_seconds, self._start = 0, 0.0, perf_counter()

    def advance(self, rows: Rows) -> None:
        self._positions += rows.num_rows
        self._forward_seconds += rows.seconds
        self._progress.advance(rows.num_rows, self._note())

    def close(self, directory: StageDirectory) -> None:
        """End the line, and leave the figures in the stage's log; nothing where there was nothing to do."""
        if self._positions:
            self._progress.close(self._note())
            directory.log.write(
                "extracted",
                positions=self._positions,
                bytes=self._positions * self._bytes_each,
                seconds=round(perf_counter() - self._start, 3),
                forward_seconds=round(self._forward_seconds, 3),
            )

    def _note(self) -> str:
        outside = 1 - self._forward_seconds / max(perf_counter() - self._start, 1e-9)
        gigabytes = self._positions * self._bytes_each / 1e9
        return f"{gigabytes:.3f} GB, {max(outside, 0):.0%} of the time outside the forward pass"


def _extract_unit(
    corpus: CorpusSplit,
    reader: UnitReader,
    block: Block,
    next_block: Callable[[], Block | None],
    unit_positions: int,
    writer: UnitWriter,
    meter: _Meter,
) -> dict[str, Any]:
    """One unit's files; the next unit is begun while they are finished."""
    num_clipped = 0
    name_of = partial(file_name, first=block.start, unit_positions=unit_positions, total=corpus.num_counted)
    with unit_files(writer, block.size, name_of) as files:
        for rows in reader.rows(block):
            files.put(rows.arrays)
            num_clipped += rows.num_clipped
            meter.advance(rows)
        reader.begin(next_block())
    return {"positions": block.size, "clipped": num_clipped}


def _audit(config: Config, queries: int, corpus: CorpusSplit, bases: Bases, world: World) -> None:
    settings = AuditSettings(
        queries=queries,
        candidates=config.audit_candidates,
        dims=config.audit_dims,
        fit_positions=config.fit_positions,
        seed=config.seed,
        batch_windows=config.batch_windows,
        device=device_of_rank(config.device, world),
    )
    run_audit(bases.key_source, corpus, open_keys(config.output), bases.key_point, settings, world)
