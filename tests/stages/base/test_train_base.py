"""Training a base: worlds agree, a stopped run continues, the best epoch is kept, and the result is a Hugging
Face model."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.stages.base import train_base
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
DRIVER = """
import json, os, sys, threading, time
from pathlib import Path
from mlpmem_ds.core.files import publish_json, read_json
from mlpmem_ds.core.log import set_up_logging
from mlpmem_ds.core.world import world_from_environment
from mlpmem_ds.stages.base import train_base
world = world_from_environment(os.environ)
set_up_logging(world, name="driver")
for job in json.loads(Path(sys.argv[1]).read_text()):
    signal_at, age = job.pop("signal_at", None), job.pop("age", None)
    if age is not None:
        for path in Path(job["output"]).glob("checkpoints/*/manifest.json"):
            manifest = read_json(path)
            manifest["values"]["seconds"] += age
            publish_json(path, manifest, seal=True)
    kill_at = job.pop("kill_at", None)
    config = train_base.Config(**{k: Path(v) if k in ("ds_config", "corpus", "output") else v for k,
        v in job.items()})
    if kill_at is not None:  # in a child, while this process has no group of ranks yet
        child = os.fork()
        if child:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
            continue
        write = train_base.Metrics.write
        def write_and_die(self, step, values, write=write):
            write(self, step, values)
            if step == kill_at:
                os.kill(os.getpid(), 9)
        train_base.Metrics.write = write_and_die
    if signal_at is not None:
        def watch(path=config.output / "metrics.jsonl"):
            while not path.exists() or path.read_text().count("\\n") < signal_at:
                time.sleep(0.001)
            os.kill(os.getpid(), 15)
        threading.Thread(target=watch, daemon=True).start()
    train_base.run(config, world)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    generator = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three"]
    for number in range(12):
        (root / "text").mkdir(exist_ok=True)
        (root / "text" / f"{number}.txt").write_text(" ".join(generator.choice(words, 350)))
    prepare_corpus.run(
        prepare_corpus.Config(
            input=(str(root / "text"),),
            tokenizer="train:270",
            output=root / "corpus",
            block_size=32,
            stride=16,
            tuning_fraction=0.25,
        ),
        World(),
    )
    (root / "fp32.json").write_text(
        json.dumps({"zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 2}})
    )
    return root


def job(root, name, **changes):
    return {
        **FLAGS,
        "ds_config": str(root / "fp32.json"),
        "corpus": str(root / "corpus"),
        "output": str(root / name),
        **changes,
    }


def drive(root, words, jobs):
    (root / "driver.py").write_text(DRIVER)
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [*words, str(root / "driver.py"), str(root / "jobs.json")],
        env=environment,
        timeout=150,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def perplexities(root, name):
    return json.loads((root / name / "manifest.json").read_text())["tuning_perplexities"]


@pytest.fixture(scope="module")
def single(root):
    return drive(
        root,
        [sys.executable],
        [
            job(root, "killed", dropout=0.1, epochs=2, save_every_steps=2, kill_at=5),
            job(root, "killed", dropout=0.1, epochs=2, save_every_steps=2),
            job(root, "straight", dropout=0.1, epochs=2),
            job(root, "one"),
            job(root, "stopped", signal_at=5),
            job(root, "stopped"),
            job(root, "on", init_from=str(root / "one"), epochs=1, select="last", learning_rate=None),
            job(root, "over", learning_rate=2.0, schedule="constant", early_stopping_patience=1, epochs=9),
            job(root, "short", time_budget=0.001, learning_rate=None),
            job(root, "late", time_budget=5000.0, signal_at=5),
            job(root, "late", time_budget=5000.0, age=6000.0),
        ],
    )


def test_the_result_is_a_model_with_its_tokenizer_and_the_perplexity_it_says(root, single):
    model = AutoModelForCausalLM.from_pretrained(root / "one").eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(root / "one")
    corpus = open_corpus(root / "corpus", "tuning")
    assert len(tokenizer) <= model.config.vocab_size == corpus.vocab_size
    total = 0.0
    for window in corpus.windows():
        tokens = torch.from_numpy(corpus.tokens(window.context_start, window.stop + 1))
        logs = torch.log_softmax(model(tokens[None, :-1]).logits[0].double(), dim=1)
        scores = logs.gather(1, tokens[1:, None])[:, 0]
        total += float(scores[window.start - window.context_start :].sum())
    found = perplexities(root, "one")
    assert math.exp(-total / corpus.num_positions) == pytest.approx(min(found), rel=1e-5)
    assert len(found) == 3 and found[-1] < found[0] < corpus.vocab_size


def test_a_stopped_run_continues_to_the_same_bytes(root, single):
    assert "stopped as asked" in single
    assert (root / "stopped" / "model.safetensors").read_bytes() == (
        root / "one" / "model.safetensors"
    ).read_bytes()


def test_a_run_killed_within_an_epoch_loses_few_steps_and_no_bit(root, single):
    """Dropout included, which draws random numbers at each step."""
    assert re.search(r"resuming from \S+/killed/checkpoints/\S+ \(step 4\)", single)
    assert (
        json.loads((root / "killed" / "manifest.json").read_text())["steps"] > 2 * 5
    )  # the fifth was within an epoch
    assert (
        perplexities(root, "killed") == perplexities(root, "straight")
        and len(perplexities(root, "killed")) == 2
    )
    assert (root / "killed" / "model.safetensors").read_bytes() == (
        root / "straight" / "model.safetensors"
    ).read_bytes()


def test_the_default_learning_rate_is_written_as_a_number(root, single):
    for name, rate in {"short": 2e-3, "on": 3e-4, "one": 0.01}.items():
        for file in ("identity.json", "run.json"):
            assert json.loads((root / name / file).read_text())["config"]["learning_rate"] == rate, (
                name,
                file,
            )
    assert "learning rate 0.0003" in single


def test_two_ranks_are_one(root, single):
    tool = str(Path(sys.executable).parent / "torchrun")
    said = drive(
        root,
        [tool, "--nproc-per-node", "2", "--master-port", str(30000 + os.getpid() % 20000)],
        [job(root, "two")],
    )
    np.testing.assert_allclose(perplexities(root, "two"), perplexities(root, "one"), rtol=1e-4)
    assert "FutureWarning" not in said  # of PyTorch's new names, about what DeepSpeed calls


def test_early_stop_deadline_and_training_on(root, single):
    over = json.loads((root / "over" / "manifest.json").read_text())
    found = over["tuning_perplexities"]
    best = int(np.argmin(found))
    assert len(found) == best + 2 < 9 and over["selected_epoch"] == best + 1
    assert json.loads((root / "short" / "manifest.json").read_text())["steps"] == 1
    late = json.loads((root / "late" / "manifest.json").read_text())  # the seconds of earlier starts count
    assert 6 <= late["steps"] < json.loads((root / "one" / "manifest.json").read_text())["steps"]
    assert perplexities(root, "on")[0] < perplexities(root, "one")[0]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch_tokens": 10**6}, "do not fill one batch"),
        ({"init_from": "/nowhere/at/all"}, "nowhere"),
        ({"num_heads": 3}, "not a multiple"),
        ({"save_every_steps": 0}, "--save-every-steps must be at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate must be more than 0, not 0.0"),
        ({"time_budget": -1.0}, "--time-budget must not be negative"),
    ],
)
def test_wrong_inputs_leave_the_disk_untouched(root, changes, said):
    values = {**job(root, "wrong"), **changes}
    with pytest.raises(UserError, match=said):
        train_base.run(
            train_base.Config(
                **{
                    name: Path(value) if name in ("ds_config", "corpus", "output") else value
                    for name, value in values.items()
                }
            ),
            World(),
        )
    assert not (root / "wrong").exists()


@pytest.mark.parametrize(
    "shape, changes, said",
    [
        ({"n_positions": 16}, {}, "blocks of 32 tokens, the model reads at most 16 .--init-from"),
        ({"n_positions": 16}, {"context": 8}, "blocks of 32 tokens"),  # the tuning split is read in blocks
        ({"n_positions": 32}, {"context": 33}, "--context 33 is more than the 32 tokens"),
        (
            {"vocab_size": 100},
            {},
            "the model one of 100 .--init-from .*: prepare the corpus with the model's own",
        ),
        ({"swap": True}, {}, "--init-from .* has another vocabulary than the corpus.*model's own tokenizer"),
    ],
)
def test_a_model_that_cannot_read_the_corpus_is_refused(root, tmp_path, shape, changes, said):
    values = {"vocab_size": open_corpus(root / "corpus").vocab_size, "n_positions": 64, **shape}
    if values.pop("swap", False):
        tokenizer = json.loads((open_corpus(root / "corpus").tokenizer_path / "tokenizer.json").read_text())
        words = tokenizer["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    shape = GPT2Config(n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0, **values)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path)
    config = train_base.Config(
        corpus=root / "corpus", output=root / "wrong", batch_tokens=256, init_from=str(tmp_path), **changes
    )
    with pytest.raises(UserError, match=said):
        train_base.run(config, World())
    assert not (root / "wrong").exists()


def test_stage_3_is_refused(root):
    with pytest.raises(UserError, match="stage 1 or 2"):
        train_base.run(
            train_base.Config(
                corpus=root / "corpus",
                output=root / "wrong",
                batch_tokens=256,
                ds_config=REPOSITORY / "ds_configs" / "zero3.json",
            ),
            World(),
        )
    assert not (root / "wrong").exists()
