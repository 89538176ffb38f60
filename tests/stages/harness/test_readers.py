"""Who reads a suite's tasks: each flag holds for every reader that it can hold for, or is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, GPT2LMHeadModel

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.models.generation_settings import end_tokens
from mlpmem_ds.stages.generation import exported_model
from mlpmem_ds.stages.harness import run_suite
from mlpmem_ds.stages.harness.config import Config
from mlpmem_ds.stages.harness.readers import Models, list_readers
from mlpmem_ds.stages.questions import arms

from ...lm_harness import needs_harness
from ..conftest import save_export, split_otherwise
from .conftest import local_files

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain_dir(export_dir: Path, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model without a memory."""
    root = tmp_path_factory.mktemp("readers") / "plain"
    GPT2LMHeadModel.from_pretrained(base_dir).save_pretrained(root)
    AutoTokenizer.from_pretrained(export_dir).save_pretrained(root)
    return root


def make_config(model: Path, **changes: Any) -> Config:
    flags = {"suite": ("nine",), "output": Path("out"), "dtype": "float32"}
    return Config(model=str(model), **flags | changes)


@pytest.mark.parametrize(("device_map", "expected"), [("none", None), ("auto", "auto")])
def test_the_device_map_holds_for_every_reader(
    export_dir: Path,
    plain_dir: Path,
    device_map: Any,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[tuple[str, str | None]] = []

    def recording(load: Callable[..., Any]) -> Callable[..., Any]:
        def record(name: str, **settings: Any) -> Any:
            loaded.append((name, settings["device_map"]))
            return load(name, **settings)

        return record

    monkeypatch.setattr(arms, "load_base", recording(arms.load_base))
    monkeypatch.setattr(exported_model, "load_model", recording(exported_model.load_model))
    for model in (export_dir, plain_dir):
        config = make_config(model, control=(f"other={plain_dir}",), device_map=device_map)
        models = Models(config, CPU)
        for reader in list_readers(config):
            models.of(reader, begin_tokens=True)
    names = [str(path) for path in (export_dir, plain_dir, plain_dir, plain_dir)]
    assert loaded == [(name, expected) for name in names]


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("--lambdas", {"lambdas": ("0.5",), "base_only_threshold": 0.1}),
        ("--generation-lambdas", {"generation_lambdas": ("0.5",)}),
        ("--base-only-threshold", {"base_only_threshold": 0.1}),
    ],
)
def test_flags_of_a_memory_need_one(
    export_dir: Path, plain_dir: Path, flag: str, changes: dict[str, Any]
) -> None:
    Models(make_config(export_dir, **changes), CPU)
    with pytest.raises(UserError, match=f"^{flag}: --model .*plain is not there or has no memory: give"):
        Models(make_config(plain_dir, **changes), CPU)


def test_the_base_with_passages_ends_where_base_and_memory_do(
    base_dir: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    """The base's generation_config.json names an end token that its config.json lacks."""
    shutil.copytree(base_dir, tmp_path / "base")
    GenerationConfig(eos_token_id=[0, 17]).save_pretrained(tmp_path / "base")
    export = save_export(tmp_path / "export", tmp_path / "base", corpus_dir, lmbda=0.35)
    config = make_config(export, passages=corpus_dir)
    models = Models(config, CPU)
    joint, with_passages = (models.of(reader, begin_tokens=True) for reader in list_readers(config))
    assert with_passages.model is joint.model.base
    assert 17 in end_tokens(with_passages.tokens["eos_token_id"])
    assert with_passages.tokens == joint.tokens


@needs_harness
@pytest.mark.parametrize("name", ["model", "control-other"])
def test_a_suite_is_not_continued_with_another_tokenizer(
    name: str, export_dir: Path, plain_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_suite._Suite, "score_all", lambda self: None)
    (tmp_path / "data").mkdir()
    local_files(tmp_path / "data")
    model, control = (shutil.copytree(place, tmp_path / place.name) for place in (export_dir, plain_dir))
    config = make_config(
        model,
        output=tmp_path / "out",
        data=tmp_path / "data",
        control=(f"other={control}",),
        max_new_tokens=4,
    )
    for _ in range(2):
        run_suite.run_suite(config, World())
    split_otherwise({"model": model, "control-other": control}[name])
    with pytest.raises(UserError, match=f"already holds another run .inputs.tokenizer-{name} was "):
        run_suite.run_suite(config, World())
