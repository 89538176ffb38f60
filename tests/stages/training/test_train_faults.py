"""Training next to its base, validated, stopped early, killed at random, out of disk, with bad numbers.

The ranks of every start are forked from one process that has imported DeepSpeed
(tests/stages/forked_training.py).
"""

import gc
import json
import math
import re
import shutil
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import TransformersSource
from mlpmem_ds.formats.checkpoint import fault_of_checkpoint, list_checkpoints
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import bfloat16_bits
from mlpmem_ds.formats.trained_models import read_weights
from mlpmem_ds.models.backbone import capture
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.conversion.weights import describe_checkpoint, find_checkpoint, with_weights
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.training import frozen_base, training

from ...manifests import record_again

HAS_COMPILER = shutil.which("g++") is not None
FLAGS = {
    "alpha": 0.0,
    "ce_through": "mixture",
    "epochs": 1.0,
    "batch_positions": 96,
    "micro_batch_positions": 24,
    "hidden_size": 16,
    "num_blocks": 2,
    "learning_rate": 0.01,
    "shuffle_window_blocks": 4,
    "log_every_steps": 1,
    "save_every_steps": 5,
    "keep_checkpoints": 9,
    "validate_every": None,
}

SPENT = {"time_budget_seconds": 1e-3}


@pytest.fixture(scope="module")
def runs(make_runs, corpus_dir, keys_dir):
    return make_runs({**FLAGS, "corpus": corpus_dir, "keys": keys_dir})


@pytest.fixture(scope="module")
def bare_keys(runs, corpus_dir, base_dir):
    """The keys of `keys_dir`, without memory inputs."""
    config = extract_keys.Config(
        model=str(base_dir),
        corpus=corpus_dir,
        output=runs / "bare",
        unit_positions=256,
        input_codec="none",
    )
    extract_keys.run(config, World())
    return runs / "bare"


@pytest.fixture(scope="module")
def damaged_keys(runs, keys_dir):
    """Keys with three inputs that are not numbers."""
    shutil.copytree(keys_dir, runs / "damaged")
    path = runs / "damaged" / "inputs-000000000000.npy"
    array = np.load(path)
    array[[3, 70, 200]] = bfloat16_bits(np.full((3, array.shape[1]), np.nan, np.float32))
    np.save(path, array)
    record_again(runs / "damaged")
    return runs / "damaged"


@pytest.fixture(scope="module")
def often(base_dir):
    """Flags of a training that is validated every two steps."""
    return {"validate_every": 2, "validation_positions": 100, "model": base_dir}


@pytest.fixture(scope="module")
def driven(runs, base_dir, often, bare_keys, damaged_keys):
    """Every start that does not depend on another's outcome; what each said, by name."""
    base = {"model": base_dir, "order": "blocks"}
    online = {"model": base_dir, "keys": bare_keys}
    diverging = {"early_stopping_patience": 2, "learning_rate": 3.0, "schedule": "constant"}
    hopeless = {"keys": damaged_keys, "batch_positions": 768, "epochs": 20.0, "max_skipped_steps": 2}
    steps = {
        "offline": runs.start("offline", 2, **base),
        "online": runs.start("online", 2, **online),
        "online-3": runs.start("online-3", 3, **{**online, "validate_every": 4}, size=3),
        "plain": runs.start("plain", 3, draw=True),
        "three": runs.start("three", 3, size=3),
        "recomputed": runs.start("recomputed", 3, recompute_activations=True),
        "validated": runs.start("validated", 2, **often, select="best"),
        "early": runs.start("early", 2, **often, **diverging),
        **{
            f"nan-{stage}": runs.start(f"nan-{stage}", stage, keys=damaged_keys, size=2)
            for stage in (0, 2, 3)
        },
        "all-nan": runs.start("all-nan", 2, **hopeless),
        "copied": runs.start("copied", 2, copy_to=runs / "copies"),
        "timed": runs.start("timed", 3, stop_after_seconds=1e-3, size=2),
        "budget": runs.start("budget", 2, **often, **SPENT, size=2),
    }
    if HAS_COMPILER:
        steps["compiled"] = runs.start("compiled", 3, compile=True, recompute_activations=True)
    results, said = runs.run(*steps.values())
    codes = dict(zip(steps, results, strict=True))
    assert [name for name, code in codes.items() if any(code)] == ["all-nan"], "".join(said)
    return dict(zip(steps, said, strict=True))


def test_online_inputs_give_the_losses_of_stored_ones(runs, driven):
    offline = runs.losses("offline")
    assert len(offline) > 5 and offline[-1] < offline[0]
    np.testing.assert_allclose(runs.losses("online"), offline, rtol=1e-5)
    np.testing.assert_allclose(runs.losses("online-3"), offline, rtol=1e-5)
    assert "the base computes them" in driven["online"] and "the base computes them" not in driven["offline"]


def test_three_ranks_give_the_losses_of_one(runs, driven):
    np.testing.assert_allclose(runs.losses("three"), runs.losses("plain"), rtol=2e-6)


def test_recomputed_activations_give_the_same_weights(runs, driven):
    runs.assert_same_weights("recomputed", "plain")


@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler")
def test_compiled_activations_give_the_same_losses(runs, driven):
    np.testing.assert_allclose(runs.losses("compiled"), runs.losses("plain"), rtol=1e-5)


def test_the_base_is_let_go_where_the_inputs_are_stored(runs, base_dir, process_group, monkeypatch):
    class BegunError(Exception):
        pass

    bases = []

    def load(*args, **settings):
        source = TransformersSource(*args, **settings)
        bases.append(weakref.ref(source.model))
        return source

    def begin(*args, **settings):
        gc.collect()
        raise BegunError(*[base() is None for base in bases])

    monkeypatch.setattr(frozen_base, "TransformersSource", load)
    monkeypatch.setattr(training, "run_steps", begin)
    with pytest.raises(BegunError) as raised:
        runs.train("let-go", 2, model=base_dir, validate_every=2)
    assert raised.value.args == (True,)


def test_validation_is_that_of_the_written_weights(runs, driven, corpus_dir, base_dir, keys_dir):
    """Against logits of the stock model and of a plain memory, position by position."""
    lines = runs.lines("validated", "validation_perplexity")
    manifest = runs.manifest("validated")
    best = min(lines, key=lambda line: line["validation_perplexity"])
    training = manifest["training"]
    assert training["selected_step"] == best["step"] and len(lines) == len(training["validations"]) >= 3
    assert json.loads((runs / "validated" / "best.json").read_text())["step"] == best["step"]

    corpus = open_corpus(corpus_dir, "tuning")
    windows = corpus.windows()
    keys = json.loads((keys_dir / "manifest.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    memory = Memory(MemoryConfig.from_dict(manifest["memory"]))
    memory.load_state_dict(runs.weights("validated"))
    point = CapturePoint(layer=keys["input_layer"], point=keys["input_point"])
    pairs = []
    for window in windows[:: math.ceil(corpus.num_positions / 100)]:
        tokens = torch.from_numpy(corpus.tokens(window.context_start, window.stop + 1))
        rows = slice(window.start - window.context_start, None)
        with torch.no_grad():
            inputs = capture(model, [point])(tokens[None, :-1]).states[point][0].bfloat16().float()
            logs = [model(tokens[None, :-1]).logits[0].double(), memory.head(memory(inputs)).double()]
        labels = tokens[1:][rows]
        pairs.append([log.log_softmax(-1)[rows][torch.arange(len(labels)), labels] for log in logs])
    base, own = (torch.cat(side) for side in zip(*pairs, strict=True))
    assert best["validation_base_perplexity"] == pytest.approx(float((-base.mean()).exp()), rel=1e-5)
    assert best["validation_memory_perplexity"] == pytest.approx(float((-own.mean()).exp()), rel=1e-4)
    mixed = [
        float((-((1 - x) * base.exp() + x * own.exp()).log().mean()).exp()) for x in np.arange(1, 21) / 20
    ]
    assert best["validation_perplexity"] == pytest.approx(min(mixed), rel=1e-4)
    assert best["validation_lambda"] == pytest.approx((1 + int(np.argmin(mixed))) / 20)


def test_validation_under_stage_3_is_dealt_to_three_ranks(runs, driven):
    """The base's perplexity is that of all positions, and the memory's falls."""
    lines = runs.lines("online-3", "validation_perplexity")
    memory = [line["validation_memory_perplexity"] for line in lines]
    assert len(lines) >= 3 and memory == sorted(memory, reverse=True)
    assert len({line["validation_base_perplexity"] for line in lines}) == 1


def test_training_stops_early_and_keeps_the_best(runs, driven):
    manifest = runs.manifest("early")
    training = manifest["training"]
    assert training["steps"] < manifest["provenance"]["steps"] and "stopped early" in driven["early"]
    assert training["selected_step"] == training["steps"] - 4  # two validations, two steps apart
    best = load_file(runs / "early" / "best" / f"step-{training['selected_step']:08d}.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in runs.weights("early").items())
    assert len(list((runs / "early" / "best").iterdir())) == 1


def test_what_people_look_at(runs, driven):
    line = runs.lines("plain")[-1]
    assert {
        "loss",
        "kl",
        "ce",
        "learning_rate",
        "gradient_norm",
        "positions_per_second",
        "mfu",
    } <= line.keys()
    assert 0 < line["mfu"] < 1.5 and line["memory_bytes"] > 1e7 and 0 <= line["data_wait_share"] <= 1
    assert (runs / "plain" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "MFU is of" in driven["plain"] and "a matrix product measured here" in driven["plain"]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_batch_of_nan_is_skipped_counted_and_named(runs, driven, stage):
    losses = runs.losses(f"nan-{stage}")
    assert all(np.isfinite(tensor).all() for tensor in runs.weights(f"nan-{stage}").values())
    skipped = [line["step"] for line in runs.lines(f"nan-{stage}") if line["loss"] is None]
    assert 1 <= len(skipped) <= 3 and runs.lines(f"nan-{stage}")[-1]["skipped_steps"] == len(skipped)
    said = driven[f"nan-{stage}"]
    assert all(f"step {step}: the gradients of batch {step - 1} are not finite" in said for step in skipped)
    named = re.findall(r"positions are not finite: ([\d, ]+)\)", said)
    assert sorted(int(number) for numbers in named for number in numbers.split(",")) == [3, 70, 200]
    assert len(losses) > 5


def test_too_many_nan_in_a_row_stop_the_training(runs, driven):
    assert "nothing is learnt. Lower --learning-rate" in driven["all-nan"]
    assert not (runs / "all-nan" / "manifest.json").exists()


def test_a_full_disk_leaves_the_old_checkpoint_and_a_second_place_takes_over(runs, driven):
    """A limit on file sizes stands for the full disk: torch.save meets the same short write."""
    runs.rewind("plain", "spare", 5)
    shutil.copytree(runs / "spare", runs / "three-from-one")
    shutil.copytree(runs / "copied", runs / "lost")
    runs.unfinish("lost")
    shutil.rmtree(runs / "lost" / "checkpoints")
    copies = list_checkpoints(runs / "copies")
    assert len(copies) == 4 and all(fault_of_checkpoint(path) is None for path in copies)
    for path in copies[:2]:  # so that there is something left to do
        shutil.rmtree(path)
    results, said = runs.run(
        runs.start("spare", 3, bytes_of_a_file=20_000),
        runs.start("spare", 3),
        runs.start("lost", 2, copy_to=runs / "copies"),
        runs.start("other", 2, copy_to=runs / "copies", seed=1),
        runs.start("plain", 3, resume="never"),
        runs.start("timed", 3, stop_after_seconds=1000.0, size=2),
        runs.start("three-from-one", 2, size=3),
    )
    assert results == [[2], [0], [0], [2], [0], [0, 0], [0, 0, 0]], "".join(said)
    assert "could not be written" in said[0] and "free some space" in said[0]
    assert "(step 5)" in said[1]
    runs.assert_same_weights("spare", "plain")
    assert f"resuming from {copies[2]}" in said[2]
    runs.assert_same_weights("lost", "copied")
    assert "is of another training" in said[3]
    assert "is complete and nothing was done" in said[4]
    assert "of 1 ranks at ZeRO stage 3, this run has 3 at stage 2: each reads its part" in said[6]
    assert "stopped after --stop-after-seconds and saved at step 3 of" in driven["timed"]
    assert "(step 3)" in said[5]
    np.testing.assert_allclose(runs.losses("timed"), runs.losses("plain"), rtol=2e-6)
    np.testing.assert_allclose(runs.losses("three-from-one"), runs.losses("plain"), rtol=2e-6)


def test_a_spent_time_budget_ends_the_training_with_a_result(runs, driven):
    """Its last step is logged, validated and saved as that of a whole run, and it read so many positions."""
    manifest = runs.manifest("budget")
    training = manifest["training"]
    assert training["steps"] == training["selected_step"] == 3 < manifest["provenance"]["steps"]
    assert [validation["step"] for validation in training["validations"]][-1] == 3
    assert "stopped after --time-budget-seconds at step 3" in driven["budget"]
    provenance = read_weights(runs / "budget").provenance
    assert (provenance.steps, provenance.steps_planned) == (3, manifest["provenance"]["steps"])
    assert provenance.num_positions_read == 3 * FLAGS["batch_positions"]
    checkpoint = weights_of_checkpoint(runs / "budget")
    weights = runs.weights("budget")
    assert len(runs.losses("budget")) == 3 and weights.keys() == checkpoint.keys()
    assert all(torch.equal(checkpoint[name], tensor) for name, tensor in weights.items())


def test_a_training_that_ended_early_makes_no_steps_when_its_result_is_written_again(runs, driven, often):
    """Killed before its manifest, damaged later, or discarded: the weights are those of its last step."""
    for name in ("cut", "rotten", "anew"):
        shutil.copytree(runs / "budget", runs / f"budget-{name}")
    for name in ("cut", "anew"):
        (runs / f"budget-{name}" / "manifest.json").unlink()
    file = runs / "budget-rotten" / "weights" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    said = runs.succeed(
        *(
            runs.start(f"budget-{name}", 2, **often, **SPENT, size=2, **more)
            for name, more in (("cut", {}), ("rotten", {}), ("anew", {"resume": "never"}))
        )
    )
    for name, words in zip(("cut", "rotten", "anew"), said, strict=True):
        assert "after --time-budget-seconds at step 3" in words, name
        runs.assert_same_weights(f"budget-{name}", "budget")
        events = (runs / f"budget-{name}" / "log.jsonl").read_text()
        assert events.count('"unit": "weights"') == (1 if name == "cut" else 2), name
    for name in ("cut", "rotten"):
        assert runs.manifest(f"budget-{name}") == runs.manifest("budget")
        assert len(runs.losses(f"budget-{name}")) == 3


def weights_of_checkpoint(output):
    """The weights in a training's newest checkpoint."""
    checkpoint = find_checkpoint(output, None)
    return with_weights(describe_checkpoint(checkpoint), checkpoint, output).weights


def test_kills_at_random_and_at_each_phase_of_saving_end_in_the_undisturbed_weights(runs):
    short = {"save_every_steps": 1, "epochs": 0.2}
    while_saving = runs.job("killed-1", 2, keep_checkpoints=1, **short)
    steps = [
        {"kind": "killed", "job": runs.job("killed-2", 3, **short), "size": 2, "kills": 3, "seed": 1},
        {"kind": "killed_while_saving", "job": while_saving, "kills": 4},
    ]
    results, said = runs.run(*steps)
    assert results[0]["hits"] == 3
    assert {"os.mkdir", "torch.save", "saved", "open", "os.rename", "shutil.rmtree"} <= set(
        results[1]["killed_before"]
    )
    assert "resuming from" in said[0] and "resuming from" in said[1]
    for size in (1, 2):
        runs.assert_same_weights(f"killed-{size}", f"killed-{size}-undisturbed")
        assert not list((runs / f"killed-{size}").rglob("*.tmp"))
