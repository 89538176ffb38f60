"""A GGUF file becomes the same model as a Hugging Face directory; a damaged one is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines import gguf
from mlpmem_ds.engines.gguf import bytes_of_weights, convert_gguf, require_gguf

from ..toy_gguf import TOKENS, write_gguf

pytest.importorskip("gguf", reason="the package gguf is not installed")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "toy.gguf")


def test_the_written_model_has_the_numbers_of_the_file(path: Path, tmp_path: Path) -> None:
    facts = convert_gguf(path, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
    assert model.state_dict().keys() == read.state_dict().keys()
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in model.state_dict().items())
    assert facts.num_parameters == sum(parameter.numel() for parameter in read.parameters())
    assert (model.generation_config.eos_token_id, model.generation_config.bos_token_id) == (2, 1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer) == len(TOKENS) and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi"
    assert facts.continuation.startswith("The capital of France is")


def test_an_untrained_model_is_warned_of(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="mlpmem_ds.engines.gguf"):
        facts = convert_gguf(path, tmp_path / "model")
    assert facts.perplexity > len(TOKENS) / 2
    assert "hardly better than chance" in caplog.text


@pytest.mark.parametrize("kept", [0.98, 0.5, 0.01])
def test_a_file_that_was_cut_is_refused(kept: float, path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match="toy.gguf cannot be read as a model .*download it again"):
        convert_gguf(path, tmp_path / "model")
    with pytest.raises(UserError, match="toy.gguf cannot be read as a model .*download it again"):
        bytes_of_weights(path)


def test_the_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "is_gguf_available", lambda: False)
    with pytest.raises(UserError, match="pip install 'gguf"):
        require_gguf()
