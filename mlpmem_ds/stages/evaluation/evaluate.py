"""`evaluate`: the base, the retriever, the memory and the controls, compared on text that none of them was
trained on.

A unit is a block of positions of one split: one pass of the base over it serves every arm that is mixed with
the base, and each arm leaves one file of log-probabilities. A control that is a model of its own has its own
units. All choices and figures are made afterwards from those files, so that another grid of λ costs a second
and no forward pass.
"""

from __future__ import annotations

import logging
from typing import Any

from mlpmem_ds.core.blocks import deal
from mlpmem_ds.core.config import default_of
from mlpmem_ds.core.log import Progress, audible_level
from mlpmem_ds.core.stage_directory import UnitWriter, open_stage
from mlpmem_ds.core.typed_json import to_json
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.evaluation import FORMAT, VERSION
from mlpmem_ds.stages.evaluation.config import Config, lambda_grid
from mlpmem_ds.stages.evaluation.inputs import Arms, Inputs, open_inputs
from mlpmem_ds.stages.evaluation.results import evaluate_scores, write_report
from mlpmem_ds.stages.evaluation.units import list_units, score_unit
from mlpmem_ds.stages.report.summary import Comparison
from mlpmem_ds.stages.report.table import render_table

_logger = logging.getLogger(__name__)


def run(config: Config, world: World) -> str | None:
    """Score what is missing; the rank that completes the last unit writes the report and returns the table as
    text."""
    inputs = open_inputs(config, world.local_rank)
    arms = inputs.arms
    directory = open_stage(
        config.output,
        stage=FORMAT,
        version=VERSION,
        config=config,
        world=world,
        inputs=_hashes(inputs),
        resolved=_resolved(config, arms),
    )
    units = list_units(arms.all, inputs.streams, config.unit_positions)
    mine = deal(list(units.values()), world.rank, world.size)
    progress = Progress(
        sum(unit.block.size for unit in mine), label="evaluation", unit="positions", world=world
    )

    def compute(name: str, writer: UnitWriter) -> dict[str, Any]:
        summary = score_unit(units[name], writer)
        progress.advance(units[name].block.size)
        return summary

    directory.run_units(list(units), compute)
    progress.close()
    comparison = Comparison(
        tuning=config.tuning_split,
        tests=tuple(name for name in inputs.splits if name != config.tuning_split),
        num_bytes={name: split.num_bytes for name, split in inputs.splits.items()},
        grid=lambda_grid(config.lambdas),
        bootstrap_samples=config.bootstrap_samples,
        bootstrap_block=config.bootstrap_block,
        subject=None if arms.subject is None else arms.subject.name,
        reference=None if arms.reference is None else arms.reference.name,
        controls=tuple(arm.name for arm in arms.controls),
    )
    tables: list[str] = []

    def describe() -> dict[str, Any]:
        evaluation = evaluate_scores(
            inputs,
            units,
            directory,
            comparison,
            speed_positions=config.speed_positions,
            num_samples=config.samples,
        )
        write_report(config.output, evaluation)
        tables.append(render_table(evaluation))
        return {
            "tokens": dict(evaluation.tokens),
            "settings": to_json(evaluation.settings),
            "arms": [arm.name for arm in arms.all],
        }

    if directory.finish(list(units), describe):
        _logger.log(audible_level(world), "the report is %s", config.output / "report.md")
    return tables[0] if tables else None


def _hashes(inputs: Inputs) -> dict[str, str]:
    hashes = {"corpus": next(iter(inputs.splits.values())).corpus.sha256}
    for arm in inputs.arms.all:
        hashes.update(arm.inputs)
    return hashes


def _resolved(config: Config, arms: Arms) -> dict[str, Any]:
    """What decides the scores in place of the flags; a flag that no arm uses has its default."""
    used = {name: value for arm in arms.all for name, value in arm.settings.items()}
    return {
        "dtype": arms.base.source.dtype_name,
        "exact": None if config.keys is None else arms.reference is not None,
        "targets": used.get("weighting"),
        "k": used.get("k"),
        "temperature": used.get("temperature"),
        "nprobe": used.get("nprobe", default_of(Config, "nprobe")),
        "memory_weights": used.get("weights", default_of(Config, "memory_weights")),
    }
