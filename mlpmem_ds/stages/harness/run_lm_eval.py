"""`run_lm_eval`: a joint model in EleutherAI's lm-evaluation-harness, at several λ.

Two kinds of local files need no network: questions with answers (NQ-open's prompt and its exact match), and
texts with choices that are ranked by likelihood. Any other task of the harness is given by its name. The
tasks that papers report are a suite (run_suite.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from mlpmem_ds.core.config import plain_values
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.lm_eval import load_tasks, require_harness, score_tasks
from mlpmem_ds.engines.tokenizer import open_encoder, require_end
from mlpmem_ds.models.generation_settings import token_settings
from mlpmem_ds.models.mixture import Constant, StoredGate
from mlpmem_ds.stages.conversion.thresholds import warn_of_fixed_weights
from mlpmem_ds.stages.generation.exported_model import open_source, settings_of_export
from mlpmem_ds.stages.harness.config import Config
from mlpmem_ds.stages.harness.local_tasks import build_tasks, check_lengths
from mlpmem_ds.stages.harness.run_suite import run_suite
from mlpmem_ds.stages.report.table import aligned_columns
from mlpmem_ds.stages.shared_flags import device_map_of, grid_of


def run(config: Config, world: World) -> str | None:
    """A table of task, metric and value at each λ; with `--output` the numbers as JSON too. With `--suite`
    the page of the suite."""
    if config.suite:
        return run_suite(config, world)
    device = device_of_rank(config.device, world)
    with tempfile.TemporaryDirectory(prefix="mlpmem-") as folder:
        tasks = build_tasks(config, Path(folder))
        require_harness()
        source = open_source(config)
        tokenizer, context = source.tokenizer, source.context
        encoder = open_encoder(
            tokenizer, label="the tokenizer of --model", special_tokens=config.special_tokens
        )
        require_end(encoder)
        check_lengths(tasks, encoder, context)
        loaded = load_tasks(
            tasks, num_fewshot=config.num_fewshot, limit=config.limit, include_path=config.include_path
        )
    model = source.load(device=device, dtype=config.dtype, device_map=device_map_of(config.device_map))
    # A task says how to choose tokens.
    model.generation_config = GenerationConfig(**token_settings(settings_of_export(model, tokenizer)))
    own: tuple[StoredGate, ...] = (Constant(0.0), model.gate)
    gates = tuple(grid_of(config.lambdas)) if config.lambdas else tuple(dict.fromkeys(own))
    if config.lambdas:
        model.base_only_threshold = config.base_only_threshold  # an export's is of its own gate
    warn_of_fixed_weights(config.base_only_threshold, gates, len(model.memories))
    results: dict[StoredGate, dict[str, dict[str, Any]]] = {}
    for gate in gates:
        model.set_gate(gate)
        results[gate] = score_tasks(model, encoder, loaded, batch_size=config.batch_size, context=context)
    if config.output is not None:
        rows = [
            {
                "lambda": gate.lmbda if isinstance(gate, Constant) else None,
                "gate": gate.settings(),
                "tasks": found,
            }
            for gate, found in results.items()
        ]
        publish_json(config.output, {"settings": plain_values(config), "results": rows})
    return render(results)


def render(results: Mapping[StoredGate, Mapping[str, Mapping[str, Any]]]) -> str:
    """Aligned columns: task, metric, a column for each gate."""
    first = next(iter(results.values()))
    cells = [["task", "metric", *map(str, results)]]
    for task, metrics in first.items():
        for metric in metrics:
            if "stderr" not in metric and metric != "sample_len":
                values = [found[task][metric] for found in results.values()]
                cells.append([task, metric.partition(",")[0], *(f"{value:.4f}" for value in values)])
    return aligned_columns(cells)
