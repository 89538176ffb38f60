"""Training a base: worlds agree, a stopped run continues, the best epoch is kept, and the result is a Hugging Face model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.stages.corpus import prepare_corpus
from mlpmem_ds.stages.training import train_base

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
from mlpmem_ds.stages.training import train_base
world = world_from_environment(os.environ)
set_up_logging(world, name="driver")
for job in json.loads(Path(sys.argv[1]).read_text()):
    signal_at, age = job.pop("signal_at", None), job.pop("age", None)
    if age is not None:
        for path in Path(job["output"]).glob("checkpoints/*/manifest.json"):
            manifest = read_json(path)
            manifest["values"]["seconds"] += age
            publish_json(path, manifest, seal=True)
    config = train_base.Config(**{k: Path(v) if k in ("ds_config", "corpus", "output") else v for k, v in job.items()})
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
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
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
            job(root, "one"),
            job(root, "stopped", signal_at=5),
            job(root, "stopped"),
            job(root, "on", init_from=str(root / "one"), epochs=1, select="last"),
            job(root, "over", learning_rate=2.0, schedule="constant", early_stopping_patience=1, epochs=9),
            job(root, "short", max_seconds=0.001),
            job(root, "late", max_seconds=5000.0, signal_at=5),
            job(root, "late", max_seconds=5000.0, age=6000.0),
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
    assert (root / "stopped" / "model.safetensors").read_bytes() == (root / "one" / "model.safetensors").read_bytes()


def test_two_ranks_are_one(root, single):
    tool = str(Path(sys.executable).parent / "torchrun")
    drive(root, [tool, "--nproc-per-node", "2", "--master-port", str(30000 + os.getpid() % 20000)], [job(root, "two")])
    np.testing.assert_allclose(perplexities(root, "two"), perplexities(root, "one"), rtol=1e-4)


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
