"""Training beside its base, validated, stopped early, killed at random, out of disk, with bad numbers.

The ranks of every start are forked from one process that has imported DeepSpeed
(tests/stages/forked_training.py).
"""

import gc
import json
import math
import re
import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import TransformersSource
from mlpmem_ds.formats.checkpoint import fault_of_checkpoint, list_checkpoints
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import bfloat16_bits
from mlpmem_ds.models.backbone import CapturePoint, capture
from mlpmem_ds.models.memory import Memory, MemoryConfig
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.training import inputs as training_inputs
from mlpmem_ds.stages.training import memory_training, train

HAS_COMPILER = shutil.which("g++") is not None
PATHS = ("ds_config", "corpus", "keys", "output", "copy_to")
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
    "validate_every": 0,
}


def start(job, size=1, **more):
    return {"kind": "start", "job": job, "size": size, **more}


def ds_config(root, stage):
    path = root / f"stage{stage}.json"
    path.write_text(
        json.dumps(
            {
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {
                    "stage": stage,
                    **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
                },
            }
        )
    )
    return str(path)


def lines(output, name="loss"):
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if name in line]


def losses(output):
    return np.array([line["loss"] for line in lines(output)])


def weights(output):
    return load_file(output / "weights" / "model.safetensors")


def assert_same_weights(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def unfinish(output):
    (output / "manifest.json").unlink()
    shutil.rmtree(output / "weights")
    shutil.rmtree(output / "done")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def bare_keys(root, corpus_dir, base_dir):
    """The keys of `keys_dir`, without memory inputs."""
    config = extract_keys.Config(
        model=str(base_dir), corpus=corpus_dir, output=root / "bare", unit_positions=256, input_codec="none"
    )
    extract_keys.run(config, World())
    return root / "bare"


@pytest.fixture(scope="module")
def damaged_keys(root, keys_dir):
    """Keys with three inputs that are not numbers."""
    shutil.copytree(keys_dir, root / "damaged")
    path = root / "damaged" / "inputs-000000000000.npy"
    array = np.load(path)
    array[[3, 70, 200]] = bfloat16_bits(np.full((3, array.shape[1]), np.nan, np.float32))
    np.save(path, array)
    return root / "damaged"


@pytest.fixture(scope="module")
def job(root, corpus_dir, keys_dir):
    def make(name, stage, **changes):
        values = {
            **FLAGS,
            "ds_config": ds_config(root, stage),
            "corpus": str(corpus_dir),
            "keys": str(keys_dir),
        }
        return {**values, "output": str(root / name), **{key: value for key, value in changes.items()}}

    return make


@pytest.fixture(scope="module")
def driven(root, job, base_dir, bare_keys, damaged_keys, forked_training):
    """Every start that does not depend on another's outcome; what each said, by name."""
    base = {"model": str(base_dir), "order": "blocks"}
    online = {"model": str(base_dir), "keys": str(bare_keys)}
    often = {"validate_every": 2, "validation_positions": 100, "model": str(base_dir)}
    steps = {
        "offline": start(job("offline", 2, **base)),
        "online": start(job("online", 2, **online)),
        "online-3": start(job("online-3", 3, **online, validate_every=4), 3),
        "plain": start(job("plain", 3)),
        "three": start(job("three", 3), 3),
        "recomputed": start(job("recomputed", 3, recompute_activations=True)),
        **(
            {"compiled": start(job("compiled", 3, compile=True, recompute_activations=True))}
            if HAS_COMPILER
            else {}
        ),
        "validated": start(job("validated", 2, **often, select="best")),
        "early": start(
            job("early", 2, **often, early_stopping_patience=2, learning_rate=3.0, schedule="constant")
        ),
        **{
            f"nan-{stage}": start(job(f"nan-{stage}", stage, keys=str(damaged_keys)), 2)
            for stage in (0, 2, 3)
        },
        "all-nan": start(
            job("all-nan", 2, keys=str(damaged_keys), batch_positions=768, epochs=20.0, max_skipped_steps=2)
        ),
        "copied": start(job("copied", 2, copy_to=str(root / "copies"))),
        "timed": start(job("timed", 3, max_seconds=1e-3), 2),
    }
    results, said = forked_training(*steps.values())
    codes = dict(zip(steps, results, strict=True))
    assert [name for name, code in codes.items() if any(code)] == ["all-nan"], "".join(said)
    return dict(zip(steps, said, strict=True))


def test_online_inputs_give_the_losses_of_stored_ones(root, driven):
    offline = losses(root / "offline")
    assert len(offline) > 5 and offline[-1] < offline[0]
    np.testing.assert_allclose(losses(root / "online"), offline, rtol=1e-5)
    np.testing.assert_allclose(losses(root / "online-3"), offline, rtol=1e-5)
    assert "the base computes them" in driven["online"] and "the base computes them" not in driven["offline"]


def test_three_ranks_give_the_losses_of_one(root, driven):
    np.testing.assert_allclose(losses(root / "three"), losses(root / "plain"), rtol=2e-6)


def test_recomputed_activations_give_the_same_weights(root, driven):
    assert_same_weights(root / "recomputed", root / "plain")


@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile wants a C++ compiler")
def test_compiled_activations_give_the_same_losses(root, driven):
    np.testing.assert_allclose(losses(root / "compiled"), losses(root / "plain"), rtol=1e-5)


def test_without_a_compiler_nothing_is_written(root, job, monkeypatch):
    def compile_nothing(function):
        raise RuntimeError("no g++\nmany lines")

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(
        UserError,
        match=r"--compile: torch.compile does not work on rank 0 \(no g\+\+\): .* leave --compile out",
    ):
        values = job("uncompiled", 0, compile=True).items()
        train.run(
            train.Config(**{name: Path(value) if name in PATHS else value for name, value in values}), World()
        )
    assert not (root / "uncompiled").exists()


def test_the_base_is_let_go_where_the_inputs_are_stored(root, job, base_dir, process_group, monkeypatch):
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

    monkeypatch.setattr(training_inputs, "TransformersSource", load)
    monkeypatch.setattr(memory_training, "run_steps", begin)
    values = job("let-go", 2, model=str(base_dir), validate_every=2).items()
    with pytest.raises(BegunError) as raised:
        train.run(
            train.Config(**{name: Path(value) if name in PATHS else value for name, value in values}), World()
        )
    assert raised.value.args == (True,)


def test_validation_is_that_of_the_written_weights(root, driven, corpus_dir, base_dir, keys_dir):
    """Against logits of the stock model and of a plain memory, position by position."""
    found = lines(root / "validated", "validation_perplexity")
    manifest = json.loads((root / "validated" / "manifest.json").read_text())
    best = min(found, key=lambda line: line["validation_perplexity"])
    assert manifest["selected_step"] == best["step"] and len(found) == len(manifest["validations"]) >= 3
    assert json.loads((root / "validated" / "best.json").read_text())["step"] == best["step"]

    corpus = open_corpus(corpus_dir, "tuning")
    windows = corpus.windows()
    keys = json.loads((keys_dir / "manifest.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    memory = Memory(MemoryConfig.from_dict(manifest["memory"]))
    memory.load_state_dict(weights(root / "validated"))
    point = CapturePoint(layer=keys["input_layer"], point=keys["key_point"])
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


def test_validation_under_stage_3_is_dealt_to_three_ranks(root, driven):
    """The base's perplexity is that of all positions, and the memory's falls."""
    found = lines(root / "online-3", "validation_perplexity")
    memory = [line["validation_memory_perplexity"] for line in found]
    assert len(found) >= 3 and memory == sorted(memory, reverse=True)
    assert len({line["validation_base_perplexity"] for line in found}) == 1


def test_training_stops_early_and_keeps_the_best(root, driven):
    manifest = json.loads((root / "early" / "manifest.json").read_text())
    assert manifest["steps"] < manifest["provenance"]["steps"] and "stopped early" in driven["early"]
    assert manifest["selected_step"] == manifest["steps"] - 4  # two validations, two steps apart
    best = load_file(root / "early" / "best" / f"step-{manifest['selected_step']:08d}.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in weights(root / "early").items())
    assert len(list((root / "early" / "best").iterdir())) == 1


def test_what_people_look_at(root, driven):
    line = lines(root / "plain")[-1]
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
    assert (root / "plain" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "MFU is of" in driven["plain"] and "a matrix product measured here" in driven["plain"]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_batch_of_nan_is_skipped_counted_and_named(root, driven, stage):
    found = losses(root / f"nan-{stage}")
    assert all(np.isfinite(tensor).all() for tensor in weights(root / f"nan-{stage}").values())
    skipped = [line["step"] for line in lines(root / f"nan-{stage}") if line["loss"] is None]
    assert 1 <= len(skipped) <= 3 and lines(root / f"nan-{stage}")[-1]["skipped_steps"] == len(skipped)
    said = driven[f"nan-{stage}"]
    assert all(f"step {step}: the gradients of batch {step - 1} are not finite" in said for step in skipped)
    named = re.findall(r"positions are not finite: ([\d, ]+)\)", said)
    assert sorted(int(number) for numbers in named for number in numbers.split(",")) == [3, 70, 200]
    assert len(found) > 5


def test_too_many_nan_in_a_row_stop_the_training(root, driven):
    assert "nothing is learnt. Lower --learning-rate" in driven["all-nan"]
    assert not (root / "all-nan" / "manifest.json").exists()


def test_a_full_disk_leaves_the_old_checkpoint_and_a_second_place_takes_over(
    root, driven, job, forked_training
):
    """A limit on file sizes stands for the full disk: torch.save meets the same short write."""
    shutil.copytree(root / "plain", root / "spare")
    for path in (root / "spare" / "checkpoints").glob("step-*"):
        if path.name != "step-00000005":
            shutil.rmtree(path)
    unfinish(root / "spare")
    shutil.copytree(root / "spare", root / "three-from-one")
    shutil.copytree(root / "copied", root / "lost")
    unfinish(root / "lost")
    shutil.rmtree(root / "lost" / "checkpoints")
    copies = list_checkpoints(root / "copies")
    assert len(copies) == 4 and all(fault_of_checkpoint(path) is None for path in copies)
    for path in copies[:2]:  # so that there is something left to do
        shutil.rmtree(path)
    results, said = forked_training(
        start(job("spare", 3), bytes_of_a_file=20_000),
        start(job("spare", 3)),
        start(job("lost", 2, copy_to=str(root / "copies"))),
        start(job("other", 2, copy_to=str(root / "copies"), seed=1)),
        start(job("plain", 3, resume="never")),
        start(job("timed", 3, max_seconds=1000.0), 2),
        start(job("three-from-one", 2), 3),
    )
    assert results == [[2], [0], [0], [2], [0], [0, 0], [0, 0, 0]], "".join(said)
    assert "could not be written" in said[0] and "free some space" in said[0]
    assert "(step 5)" in said[1]
    assert_same_weights(root / "spare", root / "plain")
    assert f"resuming from {copies[2]}" in said[2]
    assert_same_weights(root / "lost", root / "copied")
    assert "is of another training" in said[3]
    assert "is complete and nothing was done" in said[4]
    assert "of 1 ranks at ZeRO stage 3, this run has 3 at stage 2: converting" in said[6]
    assert "stopped after --max-seconds and saved at step 1 of" in driven["timed"] and "(step 1)" in said[5]
    np.testing.assert_allclose(losses(root / "timed"), losses(root / "plain"), rtol=2e-6)
    np.testing.assert_allclose(losses(root / "three-from-one"), losses(root / "plain"), rtol=2e-6)


def test_kills_at_random_and_at_each_phase_of_saving_end_in_the_undisturbed_weights(
    root, job, forked_training
):
    short = {"save_every_steps": 1, "epochs": 0.2}
    steps = [
        {"kind": "killed", "job": job("killed-2", 3, **short), "size": 2, "kills": 6, "seed": 1},
        {"kind": "killed_while_saving", "job": job("killed-1", 2, keep_checkpoints=1, **short), "kills": 14},
    ]
    results, said = forked_training(*steps)
    assert results[0]["hits"] == 6
    assert {"os.mkdir", "torch.save", "saved", "open", "os.rename", "shutil.rmtree"} <= set(
        results[1]["killed_before"]
    )
    assert "resuming from" in said[0] and "resuming from" in said[1]
    for size in (1, 2):
        assert_same_weights(root / f"killed-{size}", root / f"killed-{size}-undisturbed")
        assert not list((root / f"killed-{size}").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keys": "bare"}, "hold no memory inputs: give --model"),
        ({"keys": "bare", "model": "base", "order": "positions"}, "leave out --order positions"),
        ({"validate_every": 3}, "--validate-every needs --model"),
        ({"select": "best"}, "need validation"),
        ({"validate_every": None, "early_stopping_patience": 0, "model": "base"}, "at least 1"),
        ({"decay_fraction": 0.5}, "of --schedule wsd"),
        ({"max_seconds": -1.0}, "--max-seconds must be"),
        ({"wandb_project": "memory"}, "pip install wandb"),
    ],
)
def test_wrong_flags_leave_the_disk_untouched(root, job, base_dir, bare_keys, monkeypatch, changes, said):
    monkeypatch.setitem(sys.modules, "wandb", None)
    places = {"bare": bare_keys, "base": str(base_dir)}
    values = job("wrong", 2, **{name: places.get(value, value) for name, value in changes.items()})
    with pytest.raises(UserError, match=said):
        train.run(
            train.Config(**{name: Path(value) if name in PATHS else value for name, value in values.items()}),
            World(),
        )
    assert not (root / "wrong").exists()
