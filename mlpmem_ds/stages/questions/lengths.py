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
class ContextLimit:
    """The most tokens that a model reads at once, by its tokenizer; `flag` named the model."""

    flag: str
    encoder: TextEncoder
    context: int

    @property
    def free(self) -> int:
        """Tokens left next to the begin tokens."""
        return self.context - len(self.encoder.begin_ids)


def fault_of_answers(limit: ContextLimit, max_new_tokens: int) -> str | None:
    """What is wrong with answers of up to so many tokens; None: they leave room for a question."""
    if max_new_tokens < limit.free:
        return None
    return (
        f"answers have up to {max_new_tokens:,} tokens, and the model reads {limit.context:,} with the"
        " question: give a smaller --max-new-tokens"
    )


def fault_of_choice(limit: ContextLimit, context: str, continuation: str) -> str | None:
    """What is wrong with a choice, with the blank before it; None: it leaves room for a context."""
    blanks = len(context) - len(context.rstrip())
    if len(continuation.encode("utf-8", "surrogatepass")) + blanks < limit.free - 1:
        return None  # a token has a byte at least, besides one for a beginning
    _, ids = encode_pair(limit.encoder, context, continuation)
    return None if len(ids) < limit.free else too_long(len(ids), limit.context)


def too_long(num_tokens: int, context: int) -> str:
    """What is wrong with a continuation that leaves no room for a context."""
    return (
        f"a choice has {num_tokens:,} tokens, and the model reads {context:,} with the question: shorten it,"
        " or leave the record out"
    )


def check_questions(
    name: str, questions: Sequence[Question], limits: Iterable[ContextLimit], max_new_tokens: int
) -> None:
    """Refuse answers or choices that leave no token for the question.

    Args:
        name: of the set.
        questions: that are asked, all of one kind.
        limits: of the models.
        max_new_tokens: of an answer in words.

    Raises:
        UserError: with the place, both numbers and what to do.
    """
    for limit in limits:
        if questions[0].kind == "open":
            if fault := fault_of_answers(limit, max_new_tokens):
                raise UserError(f"--questions {name}, {limit.flag}: {fault}")
            continue
        for number, question in enumerate(questions, start=1):
            for choice in question.answers:
                if fault := fault_of_choice(limit, question.prompt, f" {choice}"):
                    raise UserError(f"--questions {name}, question {number}, {limit.flag}: {fault}")
