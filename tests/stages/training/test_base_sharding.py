"""A base that is cut over the ranks (ZeRO-3) beside the training: the same run as with one whole on each
rank.

The ranks are forked from one process that has imported DeepSpeed (tests/stages/forked_training.py).
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.training import train

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


def values_of(output, *names):
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line[name] for name in names] for line in found if names[0] in line])


def losses(output):
    return values_of(output, "loss")[:, 0]


def assert_same_run(one, other):
    """Bit for bit: the same numbers reach the same operations."""
    np.testing.assert_array_equal(losses(one), losses(other))
    np.testing.assert_array_equal(values_of(one, *VALIDATED), values_of(other, *VALIDATED))
    first, second = (load_file(output / "weights" / "model.safetensors") for output in (one, other))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sharding")


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
    return str(root / "holes-keys")


@pytest.fixture(scope="module")
def driven(root, corpus_dir, base_dir, bare, holes, keys_dir, forked_training):
    (root / "stage2.json").write_text(
        '{"zero_allow_untested_optimizer": true, "zero_optimization": {"stage": 2}}'
    )
    (root / "stage3.json").write_text(
        '{"zero_allow_untested_optimizer": true, "zero_optimization": {"stage": 3}}'
    )

    def start(name, size, *, stage=2, **changes):
        paths = {
            "ds_config": str(root / f"stage{stage}.json"),
            "corpus": str(corpus_dir),
            "output": str(root / name),
        }
        return {"kind": "start", "job": {**FLAGS, **paths, **bare["tied"], **changes}, "size": size}

    few = {"validation_positions": 1, "epochs": 0.5, **bare["untied"]}  # one window, and two ranks
    uneven = {
        "batch_positions": 408,
        "keys": holes,
    }  # 9, 8 and 9 windows at first; 8 go through the base at once
    steps = {
        "whole": start("whole", 2),
        "cut": start("cut", 2, **CUT),
        "offline": start("offline", 1, keys=str(keys_dir), order="blocks"),
        "untied-whole": start("untied-whole", 2, stage=3, **few),
        "untied-cut": start("untied-cut", 2, stage=3, **few, **CUT),
        "three": start("three", 3, **uneven, **CUT),
        "three-whole": start("three-whole", 3, **uneven),
        "stored": start("stored", 2, keys=str(keys_dir), order="blocks", **CUT),
        "part": start("part", 2, max_seconds=1e-3, **CUT),
        "rest": start("part", 1, **CUT),
    }
    results, said = forked_training(*steps.values())
    codes = dict(zip(steps, results, strict=True))
    assert not any(code for of_step in codes.values() for code in of_step), (codes, "".join(said))
    return dict(zip(steps, said, strict=True))


def test_a_cut_base_gives_the_run_of_a_whole_one_bit_for_bit(root, driven):
    assert len(losses(root / "cut")) > 5 and len(values_of(root / "cut", *VALIDATED)) > 1
    for cut, whole in (("cut", "whole"), ("untied-cut", "untied-whole"), ("three", "three-whole")):
        assert_same_run(root / cut, root / whole)


def test_a_cut_base_gives_the_losses_of_stored_inputs(root, driven):
    for name in ("cut", "stored", "part"):
        np.testing.assert_allclose(losses(root / name), losses(root / "offline"), rtol=1e-5, err_msg=name)
        validated = values_of(root / name, *VALIDATED)
        np.testing.assert_allclose(
            validated, values_of(root / "offline", *VALIDATED), rtol=1e-5, err_msg=name
        )
    assert (
        "stopped after --max-seconds and saved at step 1 of" in driven["part"]
        and "(step 1)" in driven["rest"]
    )


def test_each_rank_holds_its_part(root, driven):
    for name, size in (("cut", 2), ("untied-cut", 2), ("three", 3)):
        found = re.findall(
            r"cut over (\d) ranks: this one holds ([\d,]+) of its ([\d,]+) numbers", driven[name]
        )
        assert found, driven[name]
        for ranks, held, whole in ([int(number.replace(",", "")) for number in line] for line in found):
            assert ranks == size and 1 / size <= held / whole < 1 / size + 0.1  # norms and biases are on each
    assert not any("the base is cut" in driven[name] for name in ("whole", "rest"))


def test_a_fault_on_one_rank_is_named_by_all(root, driven):
    assert re.findall(r"of 2 positions are not finite: (\d+), (\d+)\)", driven["three"]) == [("3", "5")]
    assert [loss is None for loss in losses(root / "three")].count(True) == 1


def test_nothing_to_cut_is_refused(root, corpus_dir, base_dir, keys_dir, tmp_path):
    ds_config = Path(__file__).parents[3] / "ds_configs" / "cpu.json"
    given = {
        "ds_config": ds_config,
        "corpus": corpus_dir,
        "keys": keys_dir,
        "output": tmp_path / "wrong",
        "alpha": 0.0,
    }
    for more in ({}, {"model": str(base_dir), "validate_every": 0}):
        with pytest.raises(
            UserError, match="--base-sharding zero3 cuts the base .* and none does here .*: leave it out"
        ):
            train.run(train.Config(**given, **more, base_sharding="zero3"), World())
    assert not (tmp_path / "wrong").exists()
