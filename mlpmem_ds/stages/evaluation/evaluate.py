"""Last stage: the base, the retriever, the memory and the controls, side by side on text that none of them
was trained on.

A unit is a block of positions of one split: one pass of the base over it serves every arm that stands on that
base, and each arm leaves one file of log-probabilities. A control that is a model of its own has its own
units. All choices and figures come afterwards from those files (`report`), so that another grid of λ costs a
second and no forward pass.

n positions of a unit, D width of a state, T temperatures.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mlpmem_ds.core.blocks import deal, split_blocks
from mlpmem_ds.core.log import Progress, audible_level
from mlpmem_ds.core.stage_directory import UnitWriter, open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.keys import unit_name
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.evaluation.inputs import Inputs, open_inputs
from mlpmem_ds.stages.evaluation.results import FORMAT, VERSION, Unit, evaluate_scores, write_report
from mlpmem_ds.stages.evaluation.scores import memory_log_probabilities, scan
from mlpmem_ds.stages.report.page import render_table
from mlpmem_ds.stages.report.summary import BASE

_logger = logging.getLogger(__name__)


def run(config: Config, world: World) -> str | None:
    """Score what is missing; the rank that completes the last unit writes the report and returns the table as
    text."""
    inputs = open_inputs(config, world.local_rank)
    directory = open_stage(
        config.output,
        stage=FORMAT,
        version=VERSION,
        config=config,
        world=world,
        inputs=_hashes(inputs),
        extra=_resolved(config, inputs),
    )
    units = _list_units(config, inputs)
    mine = deal(list(units.values()), world.rank, world.size)
    progress = Progress(
        sum(unit.block.size for unit in mine), label="evaluation", unit="positions", world=world
    )

    def compute(name: str, writer: UnitWriter) -> dict[str, Any]:
        unit = units[name]
        score = _score_base_unit if unit.model is None else _score_model_unit
        summary = score(config, inputs, unit, writer)
        progress.advance(unit.block.size)
        return summary

    directory.run_units(list(units), compute)
    progress.close()
    tables: list[str] = []

    def describe() -> dict[str, Any]:
        evaluation = evaluate_scores(config, inputs, directory, units)
        write_report(config.output, evaluation)
        tables.append(render_table(evaluation))
        return {name: evaluation[name] for name in ("tokens", "settings")} | {"arms": inputs.arms}

    if directory.finish(list(units), describe):
        _logger.log(audible_level(world), "the report is %s", config.output / "report.md")
    return tables[0] if tables else None


def _hashes(inputs: Inputs) -> dict[str, str]:
    hashes = {"corpus": next(iter(inputs.splits.values())).corpus.sha256, "model": inputs.base_sha256}
    if inputs.datastore is not None:
        hashes["keys"] = inputs.datastore.keys.sha256
        if inputs.datastore.index is not None:
            hashes["index"] = inputs.datastore.index.sha256
    for memory in inputs.memories:
        hashes[memory.arm] = memory.sha256
    for model in inputs.models:
        hashes[model.arm] = model.sha256
    return hashes


def _resolved(config: Config, inputs: Inputs) -> dict[str, Any]:
    """The values behind the defaults that decide the scores."""
    store = inputs.datastore
    values = {
        "dtype": inputs.source.dtype_name,
        "k": store and store.k,
        "temperature": store and store.weighting.temperature,
    }
    return values | {"exact": config.exact if store is None else store.exact}


def _list_units(config: Config, inputs: Inputs) -> dict[str, Unit]:
    """All units by name: first those of the base, the dear ones, then those of each model of its own."""
    units = {}
    for model in (None, *inputs.models):
        for stream, corpus in inputs.streams.items():
            for block in split_blocks(corpus.num_positions, config.unit_positions):
                middle = "" if model is None else f"{model.arm}-"
                name = f"{stream}-{middle}{unit_name(block.start)}"
                units[name] = Unit(name=name, stream=stream, block=block, model=model)
    return units


def _score_base_unit(config: Config, inputs: Inputs, unit: Unit, writer: UnitWriter) -> dict[str, Any]:
    """One pass of the base, then what each arm on it makes of its states."""
    corpus, store = inputs.streams[unit.stream], inputs.datastore
    seconds: dict[str, float] = {}
    points = {memory.arm: memory.point for memory in inputs.memories}
    if store is not None and store.names:
        points["key"] = store.point
    with _timed(seconds, BASE):
        base = scan(inputs.source, corpus, unit.block, points, batch_windows=config.batch_windows)
    writer.array(unit.file(BASE), base.log_probabilities_n)
    writer.array(unit.guess_file(BASE), base.guesses_n3)
    values_n = corpus.values(*unit.block)
    for arm, scorer in store.scorers.items() if store is not None else ():
        scorer.prepare()
        with _timed(seconds, arm):
            neighbours = scorer.neighbours(base.states["key"].numpy())
            scores_nT = scorer.log_probabilities(neighbours, values_n)
        writer.array(unit.file(arm), scores_nT)
        writer.array(unit.guess_file(arm), scorer.log_probabilities(neighbours, base.top_ids_n))
    tokens_n2 = np.stack([values_n, base.top_ids_n], axis=1)
    for memory in inputs.memories:
        with _timed(seconds, memory.arm):
            scores_n2 = memory_log_probabilities(memory.memory, base.states[memory.arm], tokens_n2)
        writer.array(unit.file(memory.arm), scores_n2[:, 0].copy())
        writer.array(unit.guess_file(memory.arm), scores_n2[:, 1].copy())
    return {
        "positions": unit.block.size,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "device": str(inputs.source.device),
    }


def _score_model_unit(config: Config, inputs: Inputs, unit: Unit, writer: UnitWriter) -> dict[str, Any]:
    assert unit.model is not None
    corpus, arm = inputs.streams[unit.stream], unit.model.arm
    seconds: dict[str, float] = {}
    with _timed(seconds, arm):
        scores = scan(unit.model.source, corpus, unit.block, {}, batch_windows=config.batch_windows)
    writer.array(unit.file(arm), scores.log_probabilities_n)
    writer.array(unit.guess_file(arm), scores.guesses_n3)
    return {"positions": unit.block.size, "seconds": seconds}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 4)
