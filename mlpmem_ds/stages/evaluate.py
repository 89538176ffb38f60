"""Last stage: the base, the retriever, the memory and the controls, side by side on text that none of them was trained on.

A unit is a block of positions of one split: one pass of the base over it serves every arm that stands on that base, and
each arm leaves one file of log-probabilities. A control that is a model of its own has its own units. All choices and
figures come afterwards from those files (`report`), so that another grid of λ costs a second and no forward pass.

n positions of a unit, D width of a state, T temperatures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block, split_blocks
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_bytes, publish_json, read_json
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.stage_directory import StageDirectory, UnitWriter, open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import StateSource, TransformersSource, scan_positions
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.keys import unit_name
from mlpmem_ds.maths.interpolation import label_log_probabilities
from mlpmem_ds.models.backbone import CapturePoint
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.stages.evaluation_inputs import (
    Config,
    Inputs,
    ModelArm,
    bytes_of_model,
    lambda_grid,
    open_inputs,
)
from mlpmem_ds.stages.report import (
    BASE,
    Arm,
    Protocol,
    plot_costs,
    plot_lambda_curves,
    render_report,
    render_table,
    summarise,
)
from mlpmem_ds.stages.retriever import TEMPERATURE_FACTORS

FORMAT, VERSION = "report", 1


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """A block of a stream, for the base and all that stands on it (model None) or for a model of its own."""

    name: str
    stream: str
    block: Block
    model: ModelArm | None

    def file(self, arm: str) -> str:
        return f"scores/{self.stream}-{arm}-{unit_name(self.block.start)}.npy"


def run(config: Config, world: World) -> str | None:
    """Score what is missing; the rank that completes the last unit writes the report and returns the table as text."""
    inputs = open_inputs(config, world.local_rank)
    directory = open_stage(
        config.output,
        stage=FORMAT,
        version=VERSION,
        config=config,
        world=world,
        inputs=_hashes(inputs),
        extra=_resolved(inputs),
    )
    units = _list_units(config, inputs)
    progress = Progress(
        sum(unit.block.size for unit in units.values()), label="evaluation", unit="positions", world=world
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
        evaluation = _evaluate(config, inputs, directory, units)
        _write_report(config.output, evaluation)
        tables.append(render_table(evaluation))
        return {name: evaluation[name] for name in ("tokens", "settings")} | {"arms": inputs.arms}

    directory.finish(list(units), describe)
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


def _resolved(inputs: Inputs) -> dict[str, Any]:
    """The values behind the defaults that decide the scores."""
    store = inputs.datastore
    return {"dtype": inputs.source.dtype_name, "k": store and store.k, "temperature": store and store.temperature}


def _list_units(config: Config, inputs: Inputs) -> dict[str, _Unit]:
    """All units by name: first those of the base, the dear ones, then those of each model of its own."""
    units = {}
    for model in (None, *inputs.models):
        for stream, corpus in inputs.streams.items():
            for block in split_blocks(corpus.num_positions, config.unit_positions):
                middle = "" if model is None else f"{model.arm}-"
                name = f"{stream}-{middle}{unit_name(block.start)}"
                units[name] = _Unit(name=name, stream=stream, block=block, model=model)
    return units


def _score_base_unit(config: Config, inputs: Inputs, unit: _Unit, writer: UnitWriter) -> dict[str, Any]:
    """One pass of the base, then what each arm on it makes of its states."""
    corpus, store = inputs.streams[unit.stream], inputs.datastore
    seconds: dict[str, float] = {}
    points = {memory.arm: memory.point for memory in inputs.memories}
    if store is not None and store.arms:
        points["key"] = store.point
    with _timed(seconds, BASE):
        log_probabilities_n, states = _scan(config, inputs.source, corpus, unit.block, points)
    writer.array(unit.file(BASE), log_probabilities_n)
    values_n = corpus.values(*unit.block)
    for arm in store.arms if store is not None else []:
        assert store is not None
        store.load(arm)
        with _timed(seconds, arm):
            neighbours = store.search(arm, store.encode(states["key"].numpy()))
            scores_nT = store.log_probabilities(neighbours, values_n)
        writer.array(unit.file(arm), scores_nT)
    for memory in inputs.memories:
        with _timed(seconds, memory.arm):
            scores_n = memory_log_probabilities(memory.memory, states[memory.arm], values_n)
        writer.array(unit.file(memory.arm), scores_n)
    return {
        "positions": unit.block.size,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "device": str(inputs.source.device),
    }


def _score_model_unit(config: Config, inputs: Inputs, unit: _Unit, writer: UnitWriter) -> dict[str, Any]:
    assert unit.model is not None
    seconds: dict[str, float] = {}
    with _timed(seconds, unit.model.arm):
        scores_n, _ = _scan(config, unit.model.source, inputs.streams[unit.stream], unit.block, {})
    writer.array(unit.file(unit.model.arm), scores_n)
    return {"positions": unit.block.size, "seconds": seconds}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 4)


def _scan(
    config: Config, source: StateSource, corpus: CorpusSplit, block: Block, points: Mapping[str, CapturePoint]
) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Log-probabilities of the values, float32 [n], and the named states, float32 [n, D]."""
    rows = list(scan_positions(source, corpus, block, points, batch_windows=config.batch_windows))
    log_probabilities_n = np.concatenate([batch.log_probabilities for batch in rows])
    if not np.isfinite(log_probabilities_n).all():
        position = block.start + int(np.flatnonzero(~np.isfinite(log_probabilities_n))[0])
        raise UserError(
            f"the log-probability at position {position} of split {corpus.name} is not finite: the model's weights "
            "are damaged, or --dtype float32 is needed"
        )
    return log_probabilities_n, {name: torch.cat([batch.states[name] for batch in rows]) for name in points}


@torch.no_grad()
def memory_log_probabilities(memory: Memory, inputs_nD: torch.Tensor, values_n: np.ndarray) -> np.ndarray:
    """log p_mem(value), float32 [n], from float32 logits; the inputs are taken to the memory's dtype and device."""
    weight_VH: torch.Tensor = memory.head.weight  # type: ignore[assignment]
    hidden_nH = memory(inputs_nD.to(dtype=weight_VH.dtype, device=weight_VH.device))
    values = torch.from_numpy(values_n).to(weight_VH.device)
    return label_log_probabilities(hidden_nH, weight_VH, values).cpu().numpy()


def _evaluate(config: Config, inputs: Inputs, directory: StageDirectory, units: Mapping[str, _Unit]) -> dict[str, Any]:
    """eval.json, from the score files and what the units noted."""
    summaries = {name: directory.read_record(name)["summary"] for name in units}
    run_record = read_json(config.output / "run.json")
    tests = tuple(name for name in inputs.splits if name != config.tuning_split)
    protocol = Protocol(
        tuning=config.tuning_split,
        tests=tests,
        num_bytes={name: split.num_bytes for name, split in inputs.splits.items()},
        lambdas=lambda_grid(config.lambdas),
        bootstrap_samples=config.bootstrap_samples,
        bootstrap_block=config.bootstrap_block,
    )
    arms = [_describe_arm(arm, config, inputs, units, summaries) for arm in inputs.arms]
    store, corpus = inputs.datastore, inputs.splits[config.test_split].corpus
    first = next(iter(summaries.values()))
    return {
        "format": f"mlpmem-{FORMAT}",
        "version": VERSION,
        "date": run_record["date"],
        "machine": run_record["machine"],
        "tuning_split": config.tuning_split,
        "test_split": config.test_split,
        "extra_splits": list(tests[1:]),
        "tokens": {name: split.num_positions for name, split in inputs.splits.items()},
        "lambdas": list(protocol.lambdas),
        "settings": {
            "k": store and store.k,
            "temperature": store and store.temperature,
            "temperature_factors": list(TEMPERATURE_FACTORS),
            "nprobe": config.nprobe if store and store.index else None,
            "index_factory": store.index.factory if store and store.index else None,
            "bootstrap_samples": config.bootstrap_samples,
            "bootstrap_block": config.bootstrap_block,
            "block_size": corpus.block_size,
            "stride": corpus.stride,
            "dtype": inputs.source.dtype_name,
            "device": first["device"],
            "threads": first["threads"],
        },
        **summarise(arms, protocol),
    }


def _describe_arm(
    arm: str, config: Config, inputs: Inputs, units: Mapping[str, _Unit], summaries: Mapping[str, Mapping[str, Any]]
) -> Arm:
    """An arm's scores by split, and its price."""
    memory = next((memory for memory in inputs.memories if memory.arm == arm), None)
    model = next((model for model in inputs.models if model.arm == arm), None)
    parameters = _num_parameters(inputs.source.model if model is None else model.source.model)
    num_bytes = (
        _bytes_of_source(config.model, inputs.source) if model is None else _bytes_of_source(model.path, model.source)
    )
    if memory is not None:
        parameters, num_bytes = parameters + _num_parameters(memory.memory), num_bytes + memory.bytes
    store = inputs.datastore
    is_knn = store is not None and arm in store.arms
    if is_knn:
        assert store is not None
        num_bytes += store.num_bytes(arm)
    mine = [unit for unit in units.values() if unit.model is model]
    by_stream = {
        stream: np.concatenate(
            [np.load(config.output / unit.file(arm), allow_pickle=False) for unit in mine if unit.stream == stream]
        )
        for stream in inputs.streams
    }
    test_units = [unit for unit in mine if unit.stream == inputs.splits[config.test_split].corpus.name]
    parts = {arm} if model is not None else {BASE, arm}
    # The median: another program on the machine slows some units many times over.
    rates = [
        unit.block.size / max(sum(summaries[unit.name]["seconds"][part] for part in parts), 1e-9) for unit in test_units
    ]
    return Arm(
        name=arm,
        scores={name: split.take(by_stream[split.corpus.name]) for name, split in inputs.splits.items()},
        alone=arm == BASE or model is not None,
        parameters=parameters,
        bytes=num_bytes,
        seconds=inputs.seconds[arm],
        tokens_per_second=float(np.median(rates)),
        temperatures=store.temperatures if store is not None and is_knn else (),
    )


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes_of_source(path: str, source: TransformersSource) -> int:
    """Of a model directory, or (a Hub name) of the weights as they are in memory."""
    if Path(path).is_dir():
        return bytes_of_model(Path(path))
    return sum(parameter.numel() * parameter.element_size() for parameter in source.model.parameters())


def _write_report(output: Path, evaluation: Mapping[str, Any]) -> None:
    publish_json(output / "eval.json", evaluation)
    plot_lambda_curves(evaluation, output / "lambda.png")
    plot_costs(evaluation, output / "cost.png")
    publish_bytes(output / "report.md", render_report(evaluation).encode())
