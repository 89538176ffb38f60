"""Part of `run_lm_eval`: whether answers and choices fit into what a model reads, before it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.lm_eval import encode_pair
from mlpmem_ds.engines.suite_tasks import Document, SuiteTask
from mlpmem_ds.engines.tokenizer import TextEncoder
from mlpmem_ds.stages.harness.grid_scores import too_long
from mlpmem_ds.stages.questions.answering import no_room_for_answers


@dataclass(frozen=True, kw_only=True)
class Room:
    """How a model reads: its tokenizer, and the most tokens."""

    flag: str
    encoder: TextEncoder
    context: int


def check_room(
    task: SuiteTask, documents: Iterable[Document], room: Room, max_new_tokens: int | None
) -> None:
    """Refuse answers or choices that leave no token for the question.

    Args:
        task: and its documents.
        documents: that are asked.
        room: of a model.
        max_new_tokens: of an answer; None: the task's own.

    Raises:
        UserError: with the task, both numbers and what to do.
    """
    encoder = room.encoder if task.metadata["begin_tokens"] else replace(room.encoder, begin_ids=())
    free = room.context - len(encoder.begin_ids)
    if task.generation is not None:
        longest = max_new_tokens or task.generation.max_new_tokens
        if longest >= free:
            said = no_room_for_answers(longest, room.context)
            raise UserError(f"task {task.name}, {room.flag}: {said}, or leave the task out")
        return
    for document in documents:
        for request in document.requests:
            text = request.continuation or ""
            blanks = len(request.context) - len(request.context.rstrip())
            if len(text.encode("utf-8", "surrogatepass")) + blanks < free - 1:
                continue  # a token has a byte at least, besides one for a beginning
            _, ids = encode_pair(encoder, request.context, text)
            if len(ids) >= free:
                raise UserError(
                    f"task {task.name}, item {document.number + 1}, {room.flag}:"
                    f" {too_long(len(ids), room.context)}"
                )
