"""Training a base: worlds agree, a stopped run continues, the best weights win, a stock model results."""

import json
import math
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlpmem_ds.core.files import publish_json, read_json
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed import process_group
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.stages.corpus import prepare_corpus

REPOSITORY = Path(__file__).resolve().parents[3]
FLAGS = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "batch_tokens": 256,
    "epochs": 3,
    "log_every_steps": 1,
    "learning_rate": 0.01,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A corpus with a tuning split, and one without."""
    root = tmp_path_factory.mktemp("base")
    generator = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three"]
    for number in range(12):
        (root / "text").mkdir(exist_ok=True)
        (root / "text" / f"{number}.txt").write_text(" ".join(generator.choice(words, 350)))
    for name, tuning_fraction in (("corpus", 0.25), ("untuned", 0.0)):
        prepare_corpus.run(
            prepare_corpus.Config(
                input=(str(root / "text"),),
                tokenizer="train:270",
                output=root / name,
                block_size=32,
                stride=16,
                tuning_fraction=tuning_fraction,
            ),
            World(),
        )
    return root


@pytest.fixture(scope="module")
def runs(make_runs, root):
    return make_runs({**FLAGS, "corpus": root / "corpus"}, stage="train_base")


@pytest.fixture(scope="module")
def single(runs, root):
    """One rank; what all said."""
    dropout = {"dropout": 0.1, "epochs": 2}
    steps = [
        runs.start("killed", 2, **dropout, save_every_steps=2, kill_at=5),
        runs.start("killed", 2, **dropout, save_every_steps=2),
        runs.start("straight", 2, **dropout),
        runs.start("one", 2),
        runs.start("stopped", 2, signal_at=5),
        runs.start("stopped", 2),
        runs.start("over", 2, learning_rate=2.0, schedule="constant", early_stopping_patience=1, epochs=9),
        runs.start("short", 2, time_budget_seconds=0.001, learning_rate=None),
        runs.start("untuned", 2, corpus=root / "untuned", epochs=1),
        runs.start("late", 2, time_budget_seconds=5000.0, signal_at=5),
    ]
    results, said = runs.run(*steps)
    assert results == [[-signal.SIGKILL]] + [[0]] * (len(steps) - 1), "".join(said)
    grow_old(runs / "late", 6000.0)
    said += runs.succeed(runs.start("late", 2, time_budget_seconds=5000.0))
    return "".join(said)


def grow_old(output, seconds):
    """Let the checkpoints say that a training has already taken so many seconds more."""
    for path in output.glob("checkpoints/*/manifest.json"):
        manifest = read_json(path)
        manifest["values"]["seconds"] += seconds
        publish_json(path, manifest, seal=True)


def test_the_result_is_a_model_with_its_tokenizer_and_the_perplexity_it_says(runs, root, single):
    model = AutoModelForCausalLM.from_pretrained(runs / "one").eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(runs / "one")
    corpus = open_corpus(root / "corpus", "tuning")
    assert len(tokenizer) <= model.config.vocab_size == corpus.vocab_size
    total = 0.0
    for window in corpus.windows():
        tokens = torch.from_numpy(corpus.tokens(window.context_start, window.stop + 1))
        logs = torch.log_softmax(model(tokens[None, :-1]).logits[0].double(), dim=1)
        scores = logs.gather(1, tokens[1:, None])[:, 0]
        total += float(scores[window.start - window.context_start :].sum())
    said = runs.perplexities("one")
    assert math.exp(-total / corpus.num_positions) == pytest.approx(min(said), rel=1e-5)
    assert len(said) == 3 and said[-1] < said[0] < corpus.vocab_size


def test_a_stopped_run_continues_to_the_same_bytes(runs, single):
    assert "stopped as asked" in single
    runs.assert_same_bytes("stopped", "one")


def test_a_run_killed_within_an_epoch_loses_few_steps_and_no_bit(runs, single):
    """Dropout included, which draws random numbers at each step."""
    assert re.search(r"resuming from \S+/killed/checkpoints/\S+ \(step 4\)", single)
    assert runs.manifest("killed")["training"]["steps"] > 2 * 5  # the fifth was within an epoch
    assert runs.perplexities("killed") == runs.perplexities("straight")
    assert len(runs.perplexities("killed")) == 2
    runs.assert_same_bytes("killed", "straight")


def test_the_default_learning_rate_is_written_as_a_number(runs, single):
    for name, rate in {"short": 2e-3, "one": 0.01}.items():
        for file in ("identity.json", "run.json"):
            config = json.loads((runs / name / file).read_text())["config"]
            assert config["learning_rate"] == rate, (name, file)
    assert "learning rate 0.002" in single


def test_two_ranks_are_one(runs, single, forked_commands):
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc-per-node", "2"]
    said = runs.launch([*torchrun, "--no-python", forked_commands / "python"], runs.start("two", 2))
    np.testing.assert_allclose(runs.perplexities("two"), runs.perplexities("one"), rtol=1e-4)
    assert "FutureWarning" not in said  # of PyTorch's new names, about what DeepSpeed calls


def test_early_stop_and_deadline(runs, single):
    over = runs.manifest("over")["training"]
    numbers = runs.perplexities("over")
    best = int(np.argmin(numbers))
    assert len(numbers) == best + 2 < 9
    assert over["selected_step"] == over["validations"][best]["step"]
    steps = {name: runs.manifest(name)["training"]["steps"] for name in ("short", "late", "one")}
    assert steps["short"] == 3
    # The seconds of earlier starts count.
    assert 6 <= steps["late"] < steps["one"]


def test_without_a_tuning_split_the_last_weights_are_written(runs, single):
    training = runs.manifest("untuned")["training"]
    assert training["validations"] == [] and training["selected_step"] == training["steps"] > 3
    assert "has no tuning split to validate on: no early stopping" in single
    assert runs.losses("untuned")[-1] < runs.losses("untuned")[0]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch_tokens": 10**6}, "do not fill one batch"),
        ({"num_heads": 3}, "not a multiple"),
        ({"save_every_steps": 0}, "--save-every-steps must be at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate must be above 0, not 0.0"),
        ({"time_budget_seconds": -1.0}, "--time-budget-seconds must be above 0"),
        ({"validate_every": None}, "--early-stopping-patience and --select best need validation"),
        ({"decay_fraction": 0.5}, "of --schedule wsd"),
        ({"ds_config": REPOSITORY / "ds_configs" / "zero3.json"}, "stage 1 or 2"),
    ],
)
def test_wrong_inputs_leave_the_disk_untouched(runs, changes, said):
    runs.refuse(said, "wrong", **{"ds_config": 2, **changes})


def test_ranks_that_do_not_know_where_to_meet_leave_the_disk_untouched(runs, monkeypatch):
    """As mpirun starts them on several hosts."""
    monkeypatch.setattr(process_group, "has_group", lambda: False)  # of another test in this process
    for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    runs.refuse("set MASTER_ADDR", "nowhere", 2, World(rank=0, size=2))
