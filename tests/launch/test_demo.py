"""The demo's script, whole, on a toy text and a toy model: every front-end as its own process, two ranks,
then again.

`python`, `torchrun` and `deepspeed` are forks of a process that has imported everything (warm_server.py).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mlpmem_ds.core.world import World
from mlpmem_ds.stages.inspection import inspect_run

ROOT = Path(__file__).parents[2]
SECONDS = 400


@pytest.fixture(scope="module")
def model_dir(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 that reads blocks of 512 tokens, its head padded beyond the tokenizer's 300 entries."""
    path = tmp_path_factory.mktemp("model") / "model"
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=304, n_positions=512, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ).save_pretrained(path)
    for file in (corpus_dir / "tokenizer").iterdir():
        shutil.copy(file, path)
    return path


def demo(*words: str, commands: Path = Path(sys.executable).parent) -> subprocess.CompletedProcess[str]:
    """Run launch/demo.sh in this test's environment; its whole process group ends with it."""
    environment = {**os.environ, "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", str(ROOT / "launch" / "demo.sh"), "--no-setup", *words], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def write_modules(folder: Path, *, seed: int, lines: int = 20) -> Path:
    """Sixty small files, enough for an interval on each split."""
    generator = random.Random(seed)
    for number in range(60):
        path = folder / f"package{number % 20}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "\n".join(f"value{generator.randint(0, 99)} = {generator.random():.6f}" for _ in range(lines))
        )
    return folder


def test_the_whole_pipeline_on_ones_own_text_and_model(
    model_dir: Path, forked_commands: Path, tmp_path: Path
) -> None:
    run, text = tmp_path / "run", write_modules(tmp_path / "text", seed=0, lines=8)
    words = [
        "--corpus",
        str(text),
        "--base",
        str(model_dir),
        "--run",
        str(run),
        "--ranks",
        "2",
        "--seed",
        "3",
    ]
    run.mkdir()
    (run / "control_seconds").touch()  # by a start that was killed before it wrote the number
    first = demo(*words, commands=forked_commands)
    assert first.returncode == 0, first.stderr[-5000:]
    evaluation = json.loads((run / "report" / "eval.json").read_text())
    arms = {arm["name"]: arm for arm in evaluation["arms"]}
    assert int((run / "control_seconds").read_text()) > 0
    metrics = (run / "base_trained_on" / "metrics.jsonl").read_text().splitlines()
    rates = [line["learning_rate"] for line in map(json.loads, metrics) if "learning_rate" in line]
    assert rates and max(rates) == pytest.approx(3e-4)  # the control really trains at its learning rate
    assert set(arms) == {"base", "base+knn_exact", "base+knn_ivfpq", "base+memory", "base+memory_ce_only",
                         "base_trained_on"}  # fmt: skip
    for arm in arms.values():
        assert arm["ppl"] > 1 and arm["bytes"] > 0 and arm["parameters"] > 0 and arm["tokens_per_second"] > 0
    assert "base+memory" in first.stdout
    for name in ("report.md", "lambda.png", "cost.png"):
        assert (run / "report" / name).stat().st_size > 500
    inspect_run.run(inspect_run.Config(run=run), World())

    weights = run / "memory" / "weights" / "model.safetensors"
    trained_at = weights.stat().st_mtime_ns
    (run / "report" / "eval.json").unlink()
    shutil.rmtree(run / "export")
    second = demo(
        *words, commands=forked_commands
    )  # continues: the memory stays, what is missing is made again
    assert second.returncode == 0, second.stderr[-5000:]
    assert weights.stat().st_mtime_ns == trained_at
    assert (run / "report" / "eval.json").is_file() and (run / "export" / "model.safetensors").is_file()


def test_a_pretrained_model_is_compared_with_itself_on_two_texts(
    model_dir: Path, forked_commands: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["--corpus", str(write_modules(tmp_path / "text", seed=0)), "--run", str(run), "--ranks", "1"]
    words += ["--general", str(write_modules(tmp_path / "other", seed=1)), "--base", str(model_dir)]
    done = demo("--pretrained", *words, commands=forked_commands)
    assert done.returncode == 0, done.stderr[-5000:]
    shown = done.stdout.partition("8/8")[2]
    assert shown.count("with the memory") == 3  # passages, continued before and after
    assert "On text of yours that it has not seen the model with its memory predicts" in shown
    assert "On other text the model with its memory predicts" in shown
    for report in ("report", "report_general"):
        arms = json.loads((run / report / "eval.json").read_text())["arms"]
        assert [arm["name"] for arm in arms] == ["base", "base+memory", "base+memory+gate"]
    assert (run / "export" / "model.safetensors").is_file()


def test_text_of_one_long_document_is_refused_before_any_model_runs(
    model_dir: Path, forked_commands: Path, tmp_path: Path
) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(path.read_text() for path in write_modules(tmp_path / "x", seed=0).rglob("*.py")))
    words = ["--pretrained", "--corpus", str(book), "--base", str(model_dir), "--ranks", "1"]
    other = ["--general", str(tmp_path / "x")]
    done = demo(*words, *other, "--run", str(tmp_path / "run"), commands=forked_commands)
    assert done.returncode == 2
    assert "tuning and test of --corpus have fewer than 512 tokens: give more text" in done.stderr
    assert not (tmp_path / "run" / "keys").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corpus", "/no/such/text"], "--corpus /no/such/text does not exist"),
        (["--ranks", "none"], "not a number of processes"),
        (["--quick", "--pretrained"], "--quick and --pretrained are two demonstrations"),
        (["--wheel", "/no.whl"], "--wheel is of --pretrained"),
        (["--general", "docs:python"], "--general is of --pretrained"),
        (["--pretrained", "--wheel", "/no.whl"], "--wheel /no.whl does not exist"),
        (["--pretrained", "--wheel", "x", "--base", "y"], "--wheel and --base are two ways"),
        (["--nonsense"], "unknown option --nonsense"),
        (["--run"], "--run needs a value"),
        (["--corpus"], "--corpus needs a path"),
        (["--run", "/dev/null"], "cannot be made a directory"),
    ],
)
def test_wrong_options_are_exit_code_2(words: list[str], message: str) -> None:
    result = demo(*words)
    assert result.returncode == 2
    assert message in result.stderr
