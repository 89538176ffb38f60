"""Part of `run_lm_eval`: whether a suite's answers and choices fit into what a model reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.suite_tasks import Document, SuiteTask
from mlpmem_ds.stages.questions.lengths import ContextLimit, fault_of_answers, fault_of_choice


def check_context(
    task: SuiteTask, documents: Iterable[Document], limit: ContextLimit, max_new_tokens: int | None
) -> None:
    """Refuse answers or choices that leave no token for the question.

    Args:
        task: and its documents.
        documents: that are asked.
        limit: of a model.
        max_new_tokens: of an answer; None: the task's own.

    Raises:
        UserError: with the task, both numbers and what to do.
    """
    if not task.metadata["begin_tokens"]:
        limit = replace(limit, encoder=replace(limit.encoder, begin_ids=()))
    if task.generation is not None:
        if fault := fault_of_answers(limit, max_new_tokens or task.generation.max_new_tokens):
            raise UserError(f"task {task.name}, {limit.flag}: {fault}, or leave the task out")
        return
    for document in documents:
        for request in document.requests:
            if fault := fault_of_choice(limit, request.context, request.continuation or ""):
                raise UserError(f"task {task.name}, item {document.number + 1}, {limit.flag}: {fault}")
