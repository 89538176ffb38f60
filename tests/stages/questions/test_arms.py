"""Who answers: the base alone and the base with its memory stop at the same tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, GPT2LMHeadModel

from mlpmem_ds.models.generation_settings import end_tokens
from mlpmem_ds.stages.questions.answering import Answerer, answer
from mlpmem_ds.stages.questions.arms import Answerers, Arm, list_arms
from mlpmem_ds.stages.questions.config import Config

from ..conftest import save_export, write_lines

PROMPT = "for value in"


@pytest.fixture(scope="module")
def first_token(base_dir: Path, corpus_dir: Path) -> int:
    """With which the base alone goes on."""
    tokenizer = AutoTokenizer.from_pretrained(corpus_dir / "tokenizer")
    ids = torch.tensor([tokenizer(PROMPT, add_special_tokens=False).input_ids])
    with torch.no_grad():
        logits_V = GPT2LMHeadModel.from_pretrained(base_dir).eval()(ids).logits[0, -1]
    return int(logits_V[: len(tokenizer)].argmax())


@pytest.fixture(scope="module")
def chat_export(
    first_token: int, base_dir: Path, corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An export of a base whose generation_config.json ends texts at a token that its config.json lacks."""
    root = tmp_path_factory.mktemp("arms")
    shutil.copytree(base_dir, root / "base")
    GenerationConfig(eos_token_id=[0, first_token]).save_pretrained(root / "base")
    return save_export(root / "export", root / "base", corpus_dir, lmbda=0.35)


def answerers(export: Path, folder: Path) -> dict[str, Answerer]:
    """Of the base, and of base and memory at two weights."""
    questions = folder / "open.dev.jsonl"
    write_lines(questions, [{"question": "what is alpha", "answer": ["alpha"]}])
    config = Config(
        model=str(export),
        questions=(questions,),
        output=folder / "out",
        lambdas=("0", "0.5"),
        dtype="float32",
    )
    models = Answerers(config, torch.device("cpu"))
    return {arm.name: models.of(arm) for arm in list_arms(config)}


def test_all_arms_of_an_export_end_at_the_same_tokens(
    chat_export: Path, first_token: int, tmp_path: Path
) -> None:
    found = answerers(chat_export, tmp_path)
    assert list(found) == ["base", "base+memory_0", "base+memory_0.5"]
    assert first_token in end_tokens(found["base"].tokens["eos_token_id"])
    for other in found.values():
        assert other.tokens == found["base"].tokens and other.context == found["base"].context
    assert not hasattr(found["base"].model, "set_gate")


def test_the_base_alone_stops_where_the_export_says(chat_export: Path, tmp_path: Path) -> None:
    found = answerers(chat_export, tmp_path)
    [alone] = answer(found["base"], [PROMPT], 6)
    assert (alone.text, alone.num_tokens) == ("", 1)


def test_a_named_weight_is_meant_without_the_exports_threshold(
    base_dir: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    export = save_export(tmp_path / "export", base_dir, corpus_dir, lmbda=0.7, threshold=0.6)
    config = Config(
        model=str(export), questions=(tmp_path / "q",), output=tmp_path, lambdas=("0.5",), dtype="float32"
    )
    models, ids = Answerers(config, torch.device("cpu")), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        base, mixed = (models.of(arm).model(ids).logits.softmax(-1) for arm in list_arms(config))
    assert float((base - mixed).abs().max()) > 0.01
    own = models.of(Arm(name="base+memory", description="", model=str(export), flag="--model")).model
    assert (own.lmbda, own.base_only_threshold) == (0.7, 0.6)
