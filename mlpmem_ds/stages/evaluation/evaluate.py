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

from mlpmem_ds.core.config import default_of, resolved_flags
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.log import log_for_all
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.verified_inputs import verify_inputs
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.ranks import Ranks
from mlpmem_ds.formats.evaluation import ArmFigures, ReportManifest, open_report
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.evaluation.inputs import Inputs, open_inputs
from mlpmem_ds.stages.evaluation.mixing import refuse_scores_without_confidences
from mlpmem_ds.stages.evaluation.results import ReportWriter
from mlpmem_ds.stages.evaluation.units import UnitScorer, list_units
from mlpmem_ds.stages.report.summary import Comparison
from mlpmem_ds.stages.stage_ranks import open_stage_ranks

_logger = logging.getLogger(__name__)


def run(config: Config, world: World) -> str | None:
    """Score what is missing; the rank that completes the last unit writes the report and returns the table as
    text."""
    with open_stage_ranks(config, world, stage=ReportManifest.FORMAT) as ranks:
        return _evaluate(config, world, ranks)


def _evaluate(config: Config, world: World, ranks: Ranks) -> str | None:
    inputs = open_inputs(config, world)
    comparison = _comparison(config, inputs)
    units = list_units(inputs.scorers, inputs.streams, config.unit_positions)
    refuse_scores_without_confidences(config.output, inputs.mixed, units)
    directory = open_stage(
        config.output,
        stage=ReportManifest.FORMAT,
        version=ReportManifest.VERSION,
        config=config,
        world=world,
        inputs=_hashes(inputs),
        resolved=_resolved(inputs),
        dealer=ranks,
    )
    for name, text in inputs.streams.items():
        verify_inputs(directory, text, text.stream_files, label=f"text-{name}")
    for arm in inputs.arms:
        arm.verify(directory)
    scorer = UnitScorer(units, world)
    directory.run_units(list(units), scorer.score)
    scorer.close()
    report = ReportWriter(
        inputs=inputs,
        units=units,
        directory=directory,
        comparison=comparison,
        speed_positions=config.speed_positions,
        num_samples=config.samples,
    )
    directory.complete(
        list(units),
        report.write,
        afterwards=lambda: log_for_all(_logger, world, "the report is %s", config.output / "report.md"),
    )
    return report.table


def _hashes(inputs: Inputs) -> dict[str, str]:
    hashes = {"corpus": next(iter(inputs.splits.values())).corpus.sha256}
    for arm in inputs.scorers:
        hashes.update(arm.inputs)
    return hashes


def _resolved(inputs: Inputs) -> dict[str, Any]:
    """What the arms made of the flags that decide scores; a flag that no arm reads has its default."""
    made = {name: value for arm in inputs.arms for name, value in arm.resolved.items()}
    return {name: made.get(name, default_of(Config, name)) for name in resolved_flags(Config)}


def _choices(config: Config, inputs: Inputs) -> dict[str, ArmFigures] | None:
    """The figures of --choices-from by arm.

    Raises:
        UserError: an arm that is mixed with the base here is not there, or another one.
    """
    if config.choices_from is None:
        return None
    found = {arm.name: arm for arm in open_report(config.choices_from, flag="--choices-from").evaluation.arms}
    for arm in inputs.arms:
        given = found.get(arm.name)
        is_alike = given is not None and (not arm.choices or given.chosen in arm.choices)
        if not arm.stands_alone and (given is None or given.lmbda is None or not is_alike):
            raise UserError(
                f"--choices-from {config.choices_from} has no choice for the arm {arm.name}: make that report"
                " with the same --memory, --control names, --k and --temperature, or leave the arm out"
            )
    for mixed in inputs.mixed:
        chosen = found[mixed.name].chosen if mixed.name in found else {}
        if mixed.gate is None and any(name not in chosen for name in mixed.names_of_weights):
            raise UserError(
                f"--choices-from {config.choices_from} has no weights for {mixed.name}: make that report with"
                " the same --memory words"
            )
    return found


def _comparison(config: Config, inputs: Inputs) -> Comparison:
    subject, reference = inputs.playing("subject"), inputs.playing("reference")
    return Comparison(
        tuning=config.tuning_split,
        tests=tuple(name for name in inputs.splits if name != config.tuning_split),
        num_bytes={name: split.num_bytes for name, split in inputs.splits.items()},
        grid=config.grid,
        bootstrap_samples=config.bootstrap_samples,
        bootstrap_block=config.bootstrap_block,
        subject=subject[0].name if subject else None,
        reference=reference[0].name if reference else None,
        controls=tuple(arm.name for arm in inputs.playing("control")),
        document_starts={name: split.document_starts() for name, split in inputs.splits.items()},
        choices=_choices(config, inputs),
        choices_from=None if config.choices_from is None else str(config.choices_from),
    )
