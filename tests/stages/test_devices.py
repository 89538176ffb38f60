"""Every stage works on its rank's own GPU: two nodes of eight pretended GPUs, rank 11."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from transformers import AutoTokenizer

from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.stages.evaluation import evaluate
from mlpmem_ds.stages.evaluation.arms import base as base_arm
from mlpmem_ds.stages.generation import exported_model, generate
from mlpmem_ds.stages.harness import run_lm_eval
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.keys import inputs as key_inputs
from mlpmem_ds.stages.targets import inputs as target_inputs
from mlpmem_ds.stages.targets import write_targets

WORLD = World(rank=11, size=16, local_rank=3)


class GivenError(Exception):
    """Carries the device that a loader was given."""


def give(*_: Any, device: torch.device, **__: Any) -> NoReturn:
    raise GivenError(device)


@pytest.fixture(autouse=True)
def _pretend_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def device_given(run: Callable[[], object]) -> torch.device:
    with pytest.raises(GivenError) as raised:
        run()
    device = raised.value.args[0]
    assert isinstance(device, torch.device)
    return device


@pytest.mark.parametrize(
    ("requested", "expected"), [("auto", "cuda:3"), ("cuda", "cuda:3"), ("cuda:6", "cuda:6"), ("cpu", "cpu")]
)
def test_models_are_loaded_on_the_gpu_of_the_rank(
    requested: str,
    expected: str,
    base_dir: Path,
    corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(key_inputs, "TransformersSource", give)
    monkeypatch.setattr(base_arm, "TransformersSource", give)
    monkeypatch.setattr(exported_model, "load_model", give)
    tokenizer = AutoTokenizer.from_pretrained(corpus_dir / "tokenizer")
    monkeypatch.setattr(exported_model, "read_export", lambda *_, **__: (None, tokenizer))
    monkeypatch.setattr(run_lm_eval, "open_encoder", lambda *_, **__: None)
    monkeypatch.setattr(run_lm_eval, "require_end", lambda encoder: 0)
    monkeypatch.setattr(run_lm_eval, "load_tasks", lambda *_, **__: None)
    monkeypatch.setattr(generate, "_encode", lambda *_: [[1]])
    monkeypatch.setattr(run_lm_eval, "require_harness", lambda: None)
    model, more = str(base_dir), {"device": requested}
    keys = extract_keys.Config(model=model, corpus=corpus_dir, output=tmp_path / "keys", **more)
    report = evaluate.Config(model=model, corpus=corpus_dir, output=tmp_path / "report", **more)
    prompt = generate.Config(model=model, prompt=("in",), **more)
    tasks = run_lm_eval.Config(model=model, tasks=("nq_open",), **more)
    found = [
        device_given(lambda: extract_keys.run(keys, WORLD)),
        device_given(lambda: evaluate.run(report, WORLD)),
        device_given(lambda: generate.run(prompt, WORLD)),
        device_given(lambda: run_lm_eval.run(tasks, WORLD)),
    ]
    assert found == [torch.device(expected)] * 4


def test_searches_and_indexes_run_on_the_gpu_of_the_rank(
    keys_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(stage: object, keys: object, factory: str, device: torch.device, ranks: object) -> NoReturn:
        raise GivenError(device)

    monkeypatch.setattr(target_inputs, "open_search", give)
    monkeypatch.setattr(target_inputs, "memory_bytes", lambda device: 10**11)
    monkeypatch.setattr(build_index, "verify_inputs", lambda *_, **__: None)
    monkeypatch.setattr(build_index, "train_index", train)
    targets = write_targets.Config(keys=keys_dir, output=tmp_path / "targets")
    index = build_index.Config(keys=keys_dir, output=tmp_path / "index", exchange="none")
    assert device_given(lambda: write_targets.run(targets, WORLD)) == torch.device("cuda:3")
    assert device_given(lambda: build_index.run(index, WORLD)) == torch.device("cuda:3")


@pytest.mark.parametrize(
    ("requested", "expected"), [("auto", "cuda:3"), ("cuda:6", "cuda:6"), ("cpu", "cpu")]
)
def test_the_audit_of_keys_searches_where_the_flag_says(
    requested: str, expected: str, corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def audit(
        source: object, corpus: object, keys: object, point: object, settings: Any, world: World
    ) -> None:
        raise GivenError(settings.device)

    monkeypatch.setattr(extract_keys, "run_audit", audit)
    monkeypatch.setattr(extract_keys, "open_keys", lambda root: root)
    bases: Any = SimpleNamespace(key_source=None, key_point=None)
    config = extract_keys.Config(
        model="base", corpus=corpus_dir, output=tmp_path / "keys", audit=50, device=requested
    )
    corpus = open_corpus(corpus_dir, "train")
    found = device_given(lambda: extract_keys._audit(config, 50, corpus, bases, WORLD))
    assert found == torch.device(expected)
