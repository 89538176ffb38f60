"""The one file that imports EleutherAI's lm-evaluation-harness (package lm_eval), and only to score.

Works with release 0.4.13, whose HFLM takes a loaded model and whose tasks may be dicts; nothing is fetched
for tasks that read local files.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError

INSTALL = 'pip install "lm_eval>=0.4.13"'


def require_harness() -> None:
    """Check that the package is installed.

    Raises:
        UserError: it is not installed; with the command that installs it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"the lm-evaluation-harness is not installed here: {INSTALL}")


def score_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    batch_size: int,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Task → metric → value, of a loaded causal language model.

    Args:
        tasks: names that the harness knows (with `include_path`: of YAML files there too), or whole task
            configurations.
        limit: documents of each task at most.

    Raises:
        UserError: the harness is missing, or it does not know a task.
    """
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if isinstance(task, str) and task not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"the harness has no task {', '.join(unknown)}: `lm_eval ls tasks` lists its own; give"
            " --include-path for yours"
        )
    harness_model = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    results = simple_evaluate(
        model=harness_model,
        tasks=[task if isinstance(task, str) else dict(task) for task in tasks],
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=0,
    )
    assert results is not None  # it is None on ranks above 0 of a distributed run, which this is not
    return {
        name: {metric: value for metric, value in numbers.items() if isinstance(value, int | float)}
        for name, numbers in results["results"].items()
    }
