"""The whole pipeline with every directory in an object store, through mirror and cache: the same checksums.

A real S3 server (moto's) in this process; trainings, and what is killed, in processes of their own.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.commands import COMMANDS

from ..conftest import write_text
from ..core.toy_stage import result_of
from ..object_store import BUCKET, KEYS, s3_server

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
URL = f"s3://{BUCKET}/run"
FIGURES_FOR_PEOPLE = ("checkpoints/", "tensorboard/", "metrics.jsonl", "curves.png")
STAGES = ("corpus", "base", "keys", "index", "targets", "memory", "report", "export")


@pytest.fixture(scope="module")
def _address() -> Iterator[str]:
    yield from s3_server()


@pytest.fixture(autouse=True)
def _environment(_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        **KEYS,
        "AWS_ENDPOINT_URL": _address,
        "MLPMEM_CACHE": str(tmp_path / "cache"),
        "DS_ACCELERATOR": "cpu",
    }.items():
        monkeypatch.setenv(name, value)


def commands(text: Path, place: str, output: Path) -> dict[str, list[str]]:
    """Stage → its command, with its inputs at `place` (a directory or a URL) and its output below
    `output`."""
    corpus, base = ("--corpus", f"{place}/corpus"), ("--model", f"{place}/base")
    config = ("--ds-config", str(ROOT / "ds_configs/zero1.json"))
    keys, index, targets = (f"{place}/{name}" for name in ("keys", "index", "targets"))
    memory = f"{place}/memory"
    found = {
        "corpus": f"prepare-corpus --input {text} --tokenizer train:300 --block-size 32 --stride 16"
        " --tuning-fraction .15 --test-fraction .15",
        "base": f"train-base {' '.join((*config, *corpus))} --num-layers 1 --hidden-size 32 --epochs 1"
        " --batch-tokens 128",
        "keys": f"extract-keys {' '.join((*base, *corpus))} --unit-positions 512",
        "index": f"build-index --keys {keys} --factory IVF4,PQ4x4",
        "targets": f"write-targets --keys {keys} --index {index} --search ivf --k 8 --shard-positions 512"
        f" --exclude same-document {' '.join(corpus)}",
        "memory": f"train {' '.join((*config, *corpus, *base))} --targets {targets}"
        " --num-blocks 1 --epochs 1 --batch-positions 128",
        "report": f"evaluate {' '.join((*base, *corpus))} --memory {memory} --keys {keys} --index {index}"
        f" --targets {targets} --speed-positions none --samples 0",
        "export": f"convert-checkpoint --checkpoint {memory} {' '.join(base)} --report {place}/report",
    }
    return {name: [*words.split(), "--output", str(output / name)] for name, words in found.items()}


def run(words: list[str]) -> None:
    """A command; a training in a process of its own, for DeepSpeed leaves traces in one."""
    name, *flags = words
    if not name.startswith("train"):
        assert COMMANDS[name](flags) == 0, words
        return
    done = subprocess.run(
        [sys.executable, "-m", "mlpmem_ds", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"


def figures_of(report: Path) -> object:
    """eval.json without times."""
    values = json.loads((report / "eval.json").read_text(encoding="utf-8"))
    return [{key: arm[key] for key in ("name", "splits", "lambda", "chosen")} for arm in values["arms"]]


def config_of(export: Path) -> object:
    """config.json, which names no directory of this machine."""
    return json.loads((export / "config.json").read_text(encoding="utf-8"))


def test_every_directory_in_the_store_gives_the_same_checksums(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", num_files=60)
    local, away = tmp_path / "local", tmp_path / "away"
    for words in commands(text, str(local), local).values():
        run(words)
    for name, words in commands(text, URL, away).items():
        run(words)
        run(["mirror", str(away / name), f"{URL}/{name}"])
    run(["mirror", URL, str(tmp_path / "copy"), "--verify"])
    for name in STAGES:
        found, copy, expected = (result_of(root / name) for root in (away, tmp_path / "copy", local))
        assert {**found, **copy} == found and found.items() >= copy.items()
        if name == "report":  # times and the date
            assert figures_of(away / name) == figures_of(local / name)
            continue
        names = found.keys() | expected.keys()
        if name == "export":  # which names the directory that the base was read from, and the report
            names -= {"config.json", "mlpmem_export.json"}
            assert config_of(away / name) == config_of(local / name)
        names = {file for file in names if not file.startswith(FIGURES_FOR_PEOPLE)}
        assert {file for file in names if found.get(file) != expected.get(file)} == set(), name
    run(["inspect-run", str(tmp_path / "copy")])


def test_two_ranks_share_what_the_cache_fetches(
    tmp_path: Path, corpus_dir: Path, base_dir: Path, keys_dir: Path
) -> None:
    """At the same time, from an empty cache: a rank reads what the other has fetched."""
    place = f"s3://{BUCKET}/ranks"
    run(["mirror", str(corpus_dir), f"{place}/corpus"])
    run(["mirror", str(base_dir), f"{place}/base"])
    read = ["--corpus", f"{place}/corpus", "--model", f"{place}/base", "--unit-positions", "256"]
    words = ["extract-keys", *read, "--exchange", "none", "--output", str(tmp_path / "keys")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "mlpmem_ds", *words],
            cwd=ROOT,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    made = result_of(tmp_path / "keys")
    assert made == result_of(keys_dir)
    hidden = {path.name for path in (tmp_path / "cache").rglob(".*") if path.is_file()}
    assert hidden == {".mlpmem-cache", ".compared"}  # its marks, and no temporary file or claim


def killed(words: list[str], seconds: float, kills: int, generator: random.Random) -> int:
    """Run a command, with kill -9 at random moments of its duration, then to its end; the kills that hit."""
    hits = 0
    for _ in range(kills):
        with subprocess.Popen(
            [sys.executable, "-m", "mlpmem_ds", *words], cwd=ROOT, stdout=subprocess.DEVNULL
        ) as process:
            time.sleep(generator.uniform(0.4, 0.95) * seconds)
            hits += process.poll() is None
            process.kill()
    run(words)
    return hits


def test_sent_and_fetched_under_kills_is_the_same(tmp_path: Path) -> None:
    """Several files, and one that is sent in three parts."""
    source, copy, url = tmp_path / "model", tmp_path / "copy", f"s3://{BUCKET}/killed/model"
    source.mkdir()
    content = np.random.default_rng(0)
    for number, size in enumerate([1 << 20] * 20 + [40 << 20]):
        (source / f"file-{number:02d}.bin").write_bytes(content.bytes(size))
    words = ["mirror", str(source), f"s3://{BUCKET}/undisturbed/model"]
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "mlpmem_ds", *words], cwd=ROOT, check=True)
    seconds = time.monotonic() - start
    generator = random.Random(0)
    hits = killed(["mirror", str(source), url], seconds, 4, generator)
    hits += killed(["mirror", url, str(copy)], seconds, 4, generator)
    assert hits > 0
    run(["mirror", url, "--verify"])
    assert result_of(copy) == result_of(source)
    assert not [path for root in (source, copy) for path in root.rglob(".*")]
