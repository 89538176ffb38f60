"""What the report says of a memory: what it was trained for, and whether it is a control."""

import re

import pytest

from mlpmem_ds.stages.evaluation.arms.memory import memory_description

from ....manifests import make_provenance


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "imitation", "alpha": 0.5}, "was trained to imitate the retriever and needs"),
        ({"objective": None}, "was trained to imitate the retriever and needs"),
        (
            {"objective": "helpful", "alpha": 0.5},
            "imitate the retriever where it is better than the base and",
        ),
        ({"objective": "helpful", "alpha": 0.0}, "on the text alone, without the retriever"),
        ({"control": "random-memory", "alpha": 0.5}, "a control: .* was not trained at all"),
        ({"control": "permuted-targets", "alpha": 0.5}, "a control: .* targets of other positions"),
    ],
)
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_a_memory_is_described_by_what_it_was_trained_for(changes, said, weights):
    text = memory_description(make_provenance(**changes), weights)
    assert re.search(said, text) and ("int8" in text) == (weights == "int8")
