"""An evaluation in a sentence: better, worse or as well as before; a gate counts before a fixed weight."""

from __future__ import annotations

import pytest

from mlpmem_ds.formats.evaluation import Sample
from mlpmem_ds.stages.report.in_words import change_in_words, samples_in_words

from ..conftest import make_arm, make_evaluation


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (-0.184, "On new pages the model with its memory predicts better than before: perplexity 9.50 where"
         " it was 12.00 (−18.4 %; 95 % interval −20.0 % to −1.0 %)."),
        (0.004, "predicts as well as before: perplexity 9.50 where it was 12.00 (+0.4 %;"),
        (0.06, "predicts worse than before: perplexity 9.50 where it was 12.00 (+6.0 %;"),
    ],
)  # fmt: skip
def test_a_change_is_a_sentence(change: float, said: str) -> None:
    arms = make_arm("base", 12.0), make_arm("base+memory", 9.5, ppl_change=change, ppl_interval=(-0.2, -0.01))
    assert said in change_in_words(make_evaluation(*arms, subject="base+memory"), "new pages")


def test_the_gate_is_what_counts_and_samples_are_columns() -> None:
    arms = [make_arm("base", 12.0)]
    for name, ppl in (("base+memory", 11.0), ("base+memory+gate", 10.0)):
        arms.append(make_arm(name, ppl, ppl_change=ppl / 12 - 1, ppl_interval=(-0.2, -0.01)))
    assert "perplexity 10.00" in change_in_words(make_evaluation(*arms, subject="base+memory"), "pages")
    sample = Sample(prompt="Ships are", base=" red", memory=" boats")
    shown = samples_in_words(make_evaluation(*arms, samples=(sample, sample)))
    assert shown.count("Ships are") == 2 and "red" in shown and "boats" in shown
    with pytest.raises(ValueError, match="has no memory"):
        change_in_words(make_evaluation(make_arm("base", 12.0)), "pages")
