"""Last stage, once every score is there: the score files and what the units noted → eval.json, the page and
the plots.

N positions of a split, V vocabulary.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.files import publish_bytes, publish_json, read_json
from mlpmem_ds.core.stage_directory import StageDirectory
from mlpmem_ds.engines.hidden_states import TransformersSource
from mlpmem_ds.formats.corpus import CorpusSplit, num_tokens_of_splits, open_corpus
from mlpmem_ds.formats.keys import unit_name
from mlpmem_ds.stages.evaluation.config import Config, lambda_grid
from mlpmem_ds.stages.evaluation.inputs import Inputs
from mlpmem_ds.stages.evaluation.models import ModelArm, bytes_of_model
from mlpmem_ds.stages.evaluation.samples import continue_samples
from mlpmem_ds.stages.evaluation.speed import measure_speeds
from mlpmem_ds.stages.evaluation.token_kinds import KINDS, kinds_of_positions, read_vocabulary_kinds
from mlpmem_ds.stages.report.breakdowns import KIND, Groups, entropy_groups, frequency_groups, shows_wins
from mlpmem_ds.stages.report.page import render_report
from mlpmem_ds.stages.report.plots import plot_costs, plot_lambda_curves, plot_speeds, plot_wins
from mlpmem_ds.stages.report.summary import BASE, MEMORY, Arm, Protocol, summarize
from mlpmem_ds.stages.retrieval.knn_scorer import NEIGHBOUR_DIVISORS, TEMPERATURE_FACTORS

FORMAT, VERSION = "report", 1
_COUNTED_TOKENS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A block of a stream, for the base and all that stands on it (model None) or for a model of its own."""

    name: str
    stream: str
    block: Block
    model: ModelArm | None

    def file(self, arm: str) -> str:
        return f"scores/{self.stream}-{arm}-{unit_name(self.block.start)}.npy"

    def guess_file(self, arm: str) -> str:
        return f"guesses/{self.stream}-{arm}-{unit_name(self.block.start)}.npy"


def evaluate_scores(
    config: Config, inputs: Inputs, directory: StageDirectory, units: Mapping[str, Unit]
) -> dict[str, Any]:
    """eval.json, from the score files and what the units noted."""
    summaries = {name: directory.read_record(name)["summary"] for name in units}
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
    summary = summarize(arms, protocol, _groups(config, inputs, arms[0]))
    lmbda = next((row["lambda"] for row in summary["arms"] if row["name"] == MEMORY), 0.0)
    store, corpus = inputs.datastore, inputs.splits[config.test_split].corpus
    first = next(iter(summaries.values()))
    return {
        "format": f"mlpmem-{FORMAT}",
        "version": VERSION,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "tuning_split": config.tuning_split,
        "test_split": config.test_split,
        "extra_splits": list(tests[1:]),
        "tokens": {name: split.num_positions for name, split in inputs.splits.items()},
        "lambdas": list(protocol.lambdas),
        "settings": {
            "k": store and store.k,
            "temperature": store and store.weighting.temperature,
            "temperature_factors": list(TEMPERATURE_FACTORS),
            "neighbour_divisors": list(NEIGHBOUR_DIVISORS),
            "nprobe": config.nprobe if store and store.index else None,
            "index_factory": store.index.factory if store and store.index else None,
            "bootstrap_samples": config.bootstrap_samples,
            "bootstrap_block": config.bootstrap_block,
            "block_size": corpus.block_size,
            "stride": corpus.stride,
            "dtype": inputs.source.dtype_name,
            "memory_weights": config.memory_weights,
            "device": first["device"],
            "threads": first["threads"],
        },
        **summary,
        "speeds": measure_speeds(config, inputs),
        "samples": continue_samples(config, inputs, lmbda),
    }


def _describe_arm(
    arm: str,
    config: Config,
    inputs: Inputs,
    units: Mapping[str, Unit],
    summaries: Mapping[str, Mapping[str, Any]],
) -> Arm:
    """An arm's scores by split, and its price."""
    memory = next((memory for memory in inputs.memories if memory.arm == arm), None)
    model = next((model for model in inputs.models if model.arm == arm), None)
    parameters = _num_parameters(inputs.source.model if model is None else model.source.model)
    num_bytes = (
        _bytes_of_source(config.model, inputs.source)
        if model is None
        else _bytes_of_source(model.path, model.source)
    )
    if memory is not None:
        parameters, num_bytes = parameters + memory.memory.config.num_parameters(), num_bytes + memory.bytes
    store = inputs.datastore
    is_knn = store is not None and arm in store.names
    if is_knn:
        assert store is not None
        num_bytes += store.scorers[arm].num_bytes
    mine = [unit for unit in units.values() if unit.model is model]
    alone = arm == BASE or model is not None
    scores = _by_split(config, inputs, [(unit, unit.file(arm)) for unit in mine]) or {}
    choices = store.scorers[arm].choices if store is not None and is_knn else ()
    if is_knn:  # a report begun by release 0.1.0 has the first of them only
        choices = choices[: scores[config.test_split].shape[1]]
    guesses = _by_split(config, inputs, [(unit, unit.guess_file(arm)) for unit in mine])
    test_units = [unit for unit in mine if unit.stream == inputs.splits[config.test_split].corpus.name]
    parts = {arm} if model is not None else {BASE, arm}
    # The median: another program on the machine slows some units many times over.
    rates = [
        unit.block.size / max(sum(summaries[unit.name]["seconds"][part] for part in parts), 1e-9)
        for unit in test_units
    ]
    return Arm(
        name=arm,
        scores=scores,
        alone=alone,
        parameters=parameters,
        bytes=num_bytes,
        seconds=inputs.seconds[arm],
        tokens_per_second=float(np.median(rates)),
        tokens=_tokens_read(arm, inputs),
        temperatures=tuple(weighting.temperature for _, weighting in choices),
        neighbours=tuple(count for count, _ in choices),
        guesses=guesses and {name: part[:, 0] if alone else part for name, part in guesses.items()},
        came=guesses and {name: part[:, 2] > 0 for name, part in guesses.items()} if alone else None,
        entropies=guesses and {name: part[:, 1] for name, part in guesses.items()} if alone else None,
    )


def _tokens_read(arm: str, inputs: Inputs) -> int | None:
    """What making the arm read beyond the base: positions of every training step, or the stored keys; None if
    not known."""
    if inputs.datastore is not None and arm in inputs.datastore.names:
        return int(inputs.datastore.keys.num_positions)
    for memory in inputs.memories:
        if memory.arm == arm:
            steps, size = memory.provenance.get("steps"), memory.provenance.get("batch_positions")
            return steps * size if steps and size else None
    for model in inputs.models:
        manifest = Path(model.path) / "manifest.json"
        if model.arm == arm and manifest.is_file():
            values = read_json(manifest)
            steps, size = values.get("steps"), values.get("config", {}).get("batch_tokens")
            return steps * size if steps and size else None
    return None


def _by_split(
    config: Config, inputs: Inputs, files: Sequence[tuple[Unit, str]]
) -> dict[str, np.ndarray] | None:
    """Split → the rows of these files, and the columns that all have; None where a file is missing.

    Reports begun by release 0.1.0 have no guesses, and fewer columns for kNN.
    """
    if not all((config.output / name).is_file() for _, name in files):
        return None
    arrays = [(unit.stream, np.load(config.output / name, allow_pickle=False)) for unit, name in files]
    least = min((array.shape[1] for _, array in arrays if array.ndim == 2), default=0)
    streams = {
        stream: np.concatenate(
            [array[..., :least] if array.ndim == 2 else array for of, array in arrays if of == stream]
        )
        for stream in inputs.streams
    }
    return {name: split.take(streams[split.corpus.name]) for name, split in inputs.splits.items()}


def _groups(config: Config, inputs: Inputs, base: Arm) -> list[Groups]:
    """The ways to part the test split's positions that the inputs allow."""
    split = inputs.splits[config.test_split]
    corpus = split.corpus
    tokens_N = split.take(corpus.tokens(0, corpus.num_positions))
    values_N = split.take(corpus.values(0, corpus.num_positions))
    groups = []
    kinds = read_vocabulary_kinds(corpus.tokenizer_path, corpus.vocab_size, corpus.end_of_document_id)
    if kinds is not None:
        groups.append(Groups(name=KIND, labels=KINDS, of_N=kinds_of_positions(kinds, tokens_N, values_N)))
    if base.entropies is not None:
        groups.append(entropy_groups(base.entropies[split.name]))
    if "train" not in inputs.streams and num_tokens_of_splits(config.corpus).get("train", 0) >= 2:
        groups.append(frequency_groups(_count_tokens(open_corpus(config.corpus, "train")), values_N))
    return groups


def _count_tokens(corpus: CorpusSplit) -> np.ndarray:
    """How often each token occurs, int64 [V]; a part of the stream at a time."""
    counts_V = np.zeros(corpus.vocab_size, dtype=np.int64)
    for start in range(0, corpus.num_tokens, _COUNTED_TOKENS):
        part = corpus.tokens(start, min(start + _COUNTED_TOKENS, corpus.num_tokens))
        counts_V += np.bincount(part, minlength=corpus.vocab_size)
    return counts_V


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes_of_source(path: str, source: TransformersSource) -> int:
    """Of a model directory, or (a Hub name) of the weights as they are in memory."""
    if Path(path).is_dir():
        return bytes_of_model(Path(path))
    return sum(parameter.numel() * parameter.element_size() for parameter in source.model.parameters())


def write_report(output: Path, evaluation: Mapping[str, Any]) -> None:
    publish_json(output / "eval.json", evaluation)
    plot_lambda_curves(evaluation, output / "lambda.png")
    plot_costs(evaluation, output / "cost.png")
    if shows_wins(evaluation):
        plot_wins(evaluation, output / "wins.png")
    if evaluation["speeds"]:
        plot_speeds(evaluation, output / "speed.png")
    publish_bytes(output / "report.md", render_report(evaluation).encode())
