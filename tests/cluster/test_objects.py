"""The whole pipeline with every directory in an object store, through mirror and cache: the same checksums.

A real S3 server (moto's) in this process, the commands in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import write_text
from ..core.toy_stage import result_of
from ..object_store import BUCKET, KEYS, s3_server

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
URL = f"s3://{BUCKET}/run"
STAGES = ("corpus", "base", "keys", "index", "targets", "memory", "report", "export")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    for address in s3_server():
        yield {
            **os.environ,
            **KEYS,
            "AWS_ENDPOINT_URL": address,
            "MLPMEM_CACHE": str(tmp_path_factory.mktemp("cache")),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }


def commands(text: Path, place: str, output: Path) -> dict[str, list[str]]:
    """Stage → its command, with its inputs at `place` (a directory or a URL) and its output below
    `output`."""
    corpus, base = ("--corpus", f"{place}/corpus"), ("--model", f"{place}/base")
    config = ("--ds-config", "ds_configs/zero1.json")
    keys, index, targets = (f"{place}/{name}" for name in ("keys", "index", "targets"))
    memory = f"{place}/memory"
    found = {
        "corpus": f"prepare-corpus --input {text} --tokenizer train:300 --block-size 32 --stride 16"
        " --tuning-fraction .15 --test-fraction .15",
        "base": f"train-base {' '.join((*config, *corpus))} --num-layers 1 --hidden-size 32 --epochs 1",
        "keys": f"extract-keys {' '.join((*base, *corpus))} --unit-positions 512",
        "index": f"build-index --keys {keys} --factory IVF4,PQ4x4",
        "targets": f"write-targets --keys {keys} --index {index} --search ivf --k 8 --shard-positions 512"
        f" --exclude same-document {' '.join(corpus)}",
        "memory": f"train {' '.join((*config, *corpus, *base))} --targets {targets}"
        " --num-blocks 1 --epochs 1",
        "report": f"evaluate {' '.join((*base, *corpus))} --memory {memory} --keys {keys} --index {index}"
        f" --targets {targets} --speed-positions none --samples 0",
        "export": f"convert-checkpoint --checkpoint {memory} {' '.join(base)} --report {place}/report",
    }
    return {name: [*words.split(), "--output", str(output / name)] for name, words in found.items()}


def run(words: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlpmem_ds", *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"


def figures_of(report: Path) -> object:
    """eval.json without times."""
    values = json.loads((report / "eval.json").read_text(encoding="utf-8"))
    return [{key: arm[key] for key in ("name", "splits", "lmbda", "chosen")} for arm in values["arms"]]


def test_every_directory_in_the_store_gives_the_same_checksums(
    environment: dict[str, str], tmp_path: Path
) -> None:
    text = write_text(tmp_path / "text")
    local, away = tmp_path / "local", tmp_path / "away"
    for words in commands(text, str(local), local).values():
        run(words, environment)
    for name, words in commands(text, URL, away).items():
        run(words, environment)
        run(["mirror", str(away / name), f"{URL}/{name}"], environment)
    run(["mirror", URL, str(tmp_path / "copy"), "--verify"], environment)
    for name in STAGES:
        found, copy, expected = (result_of(root / name) for root in (away, tmp_path / "copy", local))
        assert {**found, **copy} == found and found.items() >= copy.items()
        if name == "report":  # times and the date
            assert figures_of(away / name) == figures_of(local / name)
            continue
        passing = {file for file in found if file.startswith(("checkpoints/", "tensorboard/"))}
        names = (found.keys() | expected.keys()) - passing - {"metrics.jsonl"}
        assert {file for file in names if found.get(file) != expected.get(file)} == set(), name
    run(["inspect-run", str(tmp_path / "copy")], environment)
