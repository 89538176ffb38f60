"""`run_lm_eval`: an exported model in EleutherAI's lm-evaluation-harness, at several λ.

Two kinds of local files need no network: questions with answers (NQ-open's prompt and its exact match), and
texts with choices that are ranked by likelihood. Any other task of the harness is given by its name.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mlpmem_ds.core.config import plain_values
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.lm_eval import require_harness, score_tasks
from mlpmem_ds.models.mixture import Constant, StoredGate
from mlpmem_ds.stages.generation.exported_model import load_model, read_export
from mlpmem_ds.stages.harness.config import Config
from mlpmem_ds.stages.shared_flags import device_map_of, grid_of

_QUESTIONS, _RANKING = "local_questions", "local_ranking"


def run(config: Config, world: World) -> str:
    """A table of task, metric and value at each λ; with `--output` the numbers as JSON too."""
    with tempfile.TemporaryDirectory(prefix="mlpmem-") as folder:
        return _run_tasks(config, build_tasks(config, Path(folder)), device_of_rank(config.device, world))


def _run_tasks(config: Config, tasks: Sequence[str | dict[str, Any]], device: torch.device) -> str:
    require_harness()
    _, tokenizer = read_export(config.model)
    model = load_model(
        config.model, device=device, dtype=config.dtype, device_map=device_map_of(config.device_map)
    )
    own: tuple[StoredGate, ...] = (Constant(0.0), model.gate)
    gates = tuple(grid_of(config.lambdas)) if config.lambdas else tuple(dict.fromkeys(own))
    results: dict[StoredGate, dict[str, dict[str, Any]]] = {}
    for gate in gates:
        model.set_gate(gate)
        results[gate] = score_tasks(
            model,
            tokenizer,
            tasks,
            batch_size=config.batch_size,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            include_path=config.include_path,
        )
    if config.output is not None:
        rows = [
            {"lambda": gate.lmbda if isinstance(gate, Constant) else None, "tasks": found}
            for gate, found in results.items()
        ]
        publish_json(config.output, {"settings": plain_values(config), "results": rows})
    return render(results)


def build_tasks(config: Config, folder: Path) -> list[str | dict[str, Any]]:
    """Tasks for the harness: names, and whole configurations for the local files, which are checked by line.

    Args:
        folder: receives copies of the files with the fields of the task alone, answers always as lists: the
            harness's reader needs one type for each field.

    Raises:
        UserError: a file is missing, or a line is not as the flag says.
    """
    tasks: list[str | dict[str, Any]] = []
    if config.questions is not None:
        records = _read_lines(config.questions, "--questions", _fault_of_question)
        questions = [
            {"question": record["question"], "answer": _as_list(record["answer"])} for record in records
        ]
        tasks.append(_questions_task(_write_lines(folder / "questions.jsonl", questions)))
    if config.ranking is not None:
        records = _read_lines(config.ranking, "--ranking", _fault_of_ranking)
        rankings = [{name: record[name] for name in ("query", "choices", "gold")} for record in records]
        tasks.append(_ranking_task(_write_lines(folder / "ranking.jsonl", rankings)))
    return [*tasks, *config.tasks]


def render(results: Mapping[StoredGate, Mapping[str, Mapping[str, Any]]]) -> str:
    """Aligned columns: task, metric, a column for each gate."""
    first = next(iter(results.values()))
    cells = [["task", "metric", *map(str, results)]]
    for task, metrics in first.items():
        for metric in metrics:
            if "stderr" not in metric and metric != "sample_len":
                values = [found[task][metric] for found in results.values()]
                cells.append([task, metric.partition(",")[0], *(f"{value:.4f}" for value in values)])
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _local_data(path: Path) -> dict[str, Any]:
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path.resolve())}},
        "validation_split": "validation",
        "fewshot_split": "validation",
    }


def _questions_task(path: Path) -> dict[str, Any]:
    """NQ-open's prompt, stops and exact match (as the harness's own task), on local questions."""
    return {
        "task": _QUESTIONS,
        **_local_data(path),
        "output_type": "generate_until",
        "description": "Answer these questions:\n\n",
        "doc_to_text": "Q: {{question}}?\nA:",
        "doc_to_target": "{{answer}}",
        "fewshot_delimiter": "\n",
        "target_delimiter": " ",
        "generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 32},
        "filter_list": [
            {
                "name": "remove_whitespace",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": True,
                "regexes_to_ignore": ["\\b(?:The |the |An |A |a |an )"],
            }
        ],
        "metadata": {"version": 1.0},
    }


def _ranking_task(path: Path) -> dict[str, Any]:
    """The choice with the greatest log-probability after the query; also normalized by its bytes."""
    metrics = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ]
    return {
        "task": _RANKING,
        **_local_data(path),
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": " ",
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }


def _read_lines(path: Path, flag: str, fault_of: Callable[[Any], str | None]) -> list[dict[str, Any]]:
    if not path.exists():
        raise UserError(f"{flag} {path} does not exist: give a file of JSON lines")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{flag} {path} cannot be read as UTF-8 text ({error}): give a file of JSON lines"
        ) from error
    if not any(line.strip() for line in lines):
        raise UserError(f"{flag} {path} is empty: write one JSON object a line")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
            fault = fault_of(records[-1])
        except json.JSONDecodeError as error:
            fault = f"is not JSON ({error})"
        if fault is not None:
            raise UserError(f"{flag} {path}, line {number} {fault}: see --help for the fields")
    return records


def _write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _as_list(value: Any) -> Any:
    """One text as a list of one; anything else as it is."""
    return [value] if isinstance(value, str) else value


def _fault_of_question(record: Any) -> str | None:
    if not isinstance(record, dict) or not isinstance(record.get("question"), str):
        return "has no text in `question`"
    answers = _as_list(record.get("answer"))
    is_text = isinstance(answers, list) and answers and all(isinstance(text, str) for text in answers)
    return None if is_text else "has no text or list in `answer`"


def _fault_of_ranking(record: Any) -> str | None:
    if not isinstance(record, dict) or not isinstance(record.get("query"), str):
        return "has no text in `query`"
    choices, gold = record.get("choices"), record.get("gold")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(text, str) for text in choices)
    ):
        return "has no list of two or more texts in `choices`"
    is_index = isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(choices)
    return None if is_index else f"has {gold!r} in `gold`, which is no index into its {len(choices)} choices"
