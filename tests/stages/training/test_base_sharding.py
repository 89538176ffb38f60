"""A base that is cut over the ranks (ZeRO-3) next to the training: the run of a base that is whole on each.

The ranks are forked from one process that has imported DeepSpeed (tests/stages/forked_training.py).
"""

import re
import shutil

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mlpmem_ds.core.world import World
from mlpmem_ds.stages.keys import extract_keys

from ...manifests import record_again

VALIDATED = ("validation_base_perplexity", "validation_memory_perplexity", "validation_perplexity")
FLAGS = {
    "alpha": 0.0,
    "ce_through": "mixture",
    "epochs": 1.0,
    "batch_positions": 192,
    "micro_batch_positions": 48,
    "hidden_size": 16,
    "num_blocks": 1,
    "learning_rate": 0.01,
    "log_every_steps": 1,
    "validate_every": 3,
    "validation_positions": 100,
}
CUT = {"base_sharding": "zero3"}


def validated(runs, name):
    lines = runs.lines(name, VALIDATED[0])
    return np.array([[line[metric] for metric in VALIDATED] for line in lines])


def assert_same_run(runs, one, other):
    """Bit for bit: the same numbers reach the same operations."""
    np.testing.assert_array_equal(runs.losses(one), runs.losses(other))
    np.testing.assert_array_equal(validated(runs, one), validated(runs, other))
    runs.assert_same_weights(one, other)


@pytest.fixture(scope="module")
def runs(make_runs, corpus_dir):
    return make_runs({**FLAGS, "corpus": corpus_dir})


@pytest.fixture(scope="module")
def root(runs):
    return runs.root


@pytest.fixture(scope="module")
def untied_dir(root):
    """A Llama, whose head is a matrix of its own."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(root / "untied-base")
    return root / "untied-base"


@pytest.fixture(scope="module")
def bare(root, corpus_dir, base_dir, untied_dir):
    """Keys without memory inputs, of the tied and of the untied base."""
    places = {"tied": base_dir, "untied": untied_dir}
    for name, base in places.items():
        config = extract_keys.Config(
            model=str(base), corpus=corpus_dir, output=root / name, unit_positions=256, input_codec="none"
        )
        extract_keys.run(config, World())
    return {name: {"keys": str(root / name), "model": str(base)} for name, base in places.items()}


@pytest.fixture(scope="module")
def holes(root, bare):
    """The keys of the tied base, with two log-probabilities that are not numbers, neighbours in a batch."""
    shutil.copytree(root / "tied", root / "holes-keys")
    path = root / "holes-keys" / "log_probabilities-000000000000.npy"
    array = np.load(path)
    array[[3, 5]] = np.nan
    np.save(path, array)
    record_again(root / "holes-keys")
    return str(root / "holes-keys")


@pytest.fixture(scope="module")
def driven(runs, bare, holes, keys_dir):
    def start(name, size, *, stage=2, **changes):
        return runs.start(name, stage, size=size, **{**bare["tied"], **changes})

    few = {"validation_positions": 1, "epochs": 0.5, **bare["untied"]}  # one window, and two ranks
    # 9, 8 and 9 windows at first; 8 go through the base at once.
    uneven = {"batch_positions": 408, "keys": holes}
    stored = {"keys": keys_dir, "order": "blocks"}
    steps = {
        "whole": start("whole", 2),
        "cut": start("cut", 2, **CUT),
        "offline": start("offline", 1, **stored),
        "untied-whole": start("untied-whole", 2, stage=3, **few),
        "untied-cut": start("untied-cut", 2, stage=3, **few, **CUT),
        "three": start("three", 3, **uneven, **CUT),
        "three-whole": start("three-whole", 3, **uneven),
        "stored": start("stored", 2, **stored, **CUT),
        "part": start("part", 2, stop_after_seconds=1e-3, **CUT),
        "rest": start("part", 1, **CUT),
    }
    return dict(zip(steps, runs.succeed(*steps.values()), strict=True))


def test_a_cut_base_gives_the_run_of_a_whole_one_bit_for_bit(runs, driven):
    assert len(runs.losses("cut")) > 5 and len(validated(runs, "cut")) > 1
    for cut, whole in (("cut", "whole"), ("untied-cut", "untied-whole"), ("three", "three-whole")):
        assert_same_run(runs, cut, whole)


def test_a_cut_base_gives_the_losses_of_stored_inputs(runs, driven):
    for name in ("cut", "stored", "part"):
        np.testing.assert_allclose(runs.losses(name), runs.losses("offline"), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(validated(runs, name), validated(runs, "offline"), rtol=1e-5, err_msg=name)
    assert "stopped after --stop-after-seconds and saved at step 3 of" in driven["part"]
    assert "(step 3)" in driven["rest"]


def test_each_rank_holds_its_part(driven):
    for name, size in (("cut", 2), ("untied-cut", 2), ("three", 3)):
        counts = re.findall(
            r"cut over (\d) ranks: this one holds ([\d,]+) of its ([\d,]+) numbers", driven[name]
        )
        assert counts, driven[name]
        for ranks, held, whole in ([int(number.replace(",", "")) for number in line] for line in counts):
            assert ranks == size and 1 / size <= held / whole < 1 / size + 0.1  # norms and biases are on each
    assert not any("the base is cut" in driven[name] for name in ("whole", "rest"))


def test_a_fault_on_one_rank_is_named_by_all(runs, driven):
    assert re.findall(r"of 2 positions are not finite: (\d+), (\d+)\)", driven["three"]) == [("3", "5")]
    assert [loss is None for loss in runs.losses("three")].count(True) == 1
