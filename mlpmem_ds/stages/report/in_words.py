"""What an evaluation found, in a sentence for a person; launch/demo.sh ends with it."""

from __future__ import annotations

from mlpmem_ds.formats.evaluation import ArmFigures, Evaluation
from mlpmem_ds.stages.generation.text import side_by_side
from mlpmem_ds.stages.report.words import percent_text

_UNCHANGED = 0.005  # of the perplexity


def change_in_words(evaluation: Evaluation, text: str) -> str:
    """What the memory changed on a text: perplexity before and after, and the bounds of the change.

    Args:
        evaluation: one with a memory; where it has a gate, that is what counts.
        text: what was read, such as "documentation that it has not seen".

    Raises:
        ValueError: it compares the base with nothing.
    """
    arm = _memory_of(evaluation)
    if arm is None or arm.ppl_change is None or arm.ppl_interval is None:
        raise ValueError("the evaluation has no memory: give --memory to evaluate")
    if abs(arm.ppl_change) <= _UNCHANGED:
        how = "as well as before"
    else:
        how = "better than before" if arm.ppl_change < 0 else "worse than before"
    low, high = map(percent_text, arm.ppl_interval)
    return (
        f"On {text} the model with its memory predicts {how}: perplexity {arm.ppl:.2f} where it was"
        f" {evaluation.base.ppl:.2f} ({percent_text(arm.ppl_change)}; 95 % interval {low} to {high})."
    )


def samples_in_words(evaluation: Evaluation) -> str:
    """The passages that both continue, each followed by two columns: the model alone, and with its memory."""
    headers = ("before", "with the memory")
    return "\n\n".join(
        f"{sample.prompt}\n\n{side_by_side(headers, (sample.base, sample.memory))}"
        for sample in evaluation.samples
    )


def _memory_of(evaluation: Evaluation) -> ArmFigures | None:
    """The memory with its gate, else the memory."""
    arms = {arm.name: arm for arm in evaluation.arms}
    name = evaluation.subject
    return None if name is None else arms.get(f"{name}+gate", arms.get(name))
