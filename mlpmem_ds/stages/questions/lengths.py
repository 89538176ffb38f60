"""Whether answers and choices fit into what a model reads: asked before it is loaded, and before a byte is
written. Of what is too long the beginning of a prompt is cut off, and counted; an answer or a choice never
is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.lm_eval import encode_pair
from mlpmem_ds.engines.tokenizer import TextEncoder
from mlpmem_ds.formats.question_files import Question


@dataclass(frozen=True, kw_only=True)
class Room:
    """How a model reads: its tokenizer, and the most tokens."""

    flag: str
    encoder: TextEncoder
    context: int

    @property
    def free(self) -> int:
        """Tokens besides the begin tokens."""
        return self.context - len(self.encoder.begin_ids)


def fault_of_answers(room: Room, max_new_tokens: int) -> str | None:
    """What is wrong with answers of up to so many tokens; None: they leave room for a question."""
    if max_new_tokens < room.free:
        return None
    return (
        f"answers have up to {max_new_tokens:,} tokens, and the model reads {room.context:,} with the"
        " question: give a smaller --max-new-tokens"
    )


def fault_of_choice(room: Room, context: str, continuation: str) -> str | None:
    """What is wrong with a choice, with the blank before it; None: it leaves room for a context."""
    blanks = len(context) - len(context.rstrip())
    if len(continuation.encode("utf-8", "surrogatepass")) + blanks < room.free - 1:
        return None  # a token has a byte at least, besides one for a beginning
    _, ids = encode_pair(room.encoder, context, continuation)
    return None if len(ids) < room.free else too_long(len(ids), room.context)


def too_long(num_tokens: int, context: int) -> str:
    """What is wrong with a continuation that leaves no room for a context."""
    return (
        f"a choice has {num_tokens:,} tokens, and the model reads {context:,} with the question: shorten it,"
        " or leave the record out"
    )


def check_questions(name: str, questions: Sequence[Question], rooms: Iterable[Room], most: int) -> None:
    """Refuse answers or choices that leave no token for the question.

    Args:
        name: of the set.
        questions: that are asked, all of one kind.
        rooms: of the models.
        most: tokens of an answer in words.

    Raises:
        UserError: with the place, both numbers and what to do.
    """
    for room in rooms:
        if questions[0].kind == "open":
            if fault := fault_of_answers(room, most):
                raise UserError(f"--questions {name}, {room.flag}: {fault}")
            continue
        for number, question in enumerate(questions, start=1):
            for choice in question.answers:
                if fault := fault_of_choice(room, question.prompt, f" {choice}"):
                    raise UserError(f"--questions {name}, question {number}, {room.flag}: {fault}")
