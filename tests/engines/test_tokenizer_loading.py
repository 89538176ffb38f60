"""Tokenizers are loaded as they encode texts whole, and what cannot be loaded is told with a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines import tokenizer as home
from mlpmem_ds.engines.tokenizer_loading import load_tokenizer

from ..toy_tokenizers import KINDS, begin_and_end, byte_level
from .test_tokenizer import encoder_of, ids_of

LLAMA = {"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}


@pytest.mark.parametrize(
    "truncation", [{"max_length": 4}, {"max_length": 4, "stride": 1, "direction": "left"}]
)
@pytest.mark.parametrize(
    "padding", [{}, {"length": 64}, {"direction": "left", "pad_to_multiple_of": 32, "pad_id": 1}]
)
def test_truncation_and_padding_that_were_saved_are_off(
    tmp_path: Path, truncation: dict[str, Any], padding: dict[str, Any]
) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    expected = byte_level()(text)["input_ids"]
    tokenizer = byte_level(model_max_length=8, truncation_side="left", padding_side="left")
    tokenizer.backend_tokenizer.enable_truncation(**truncation)
    tokenizer.backend_tokenizer.enable_padding(**padding)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]
    loaded = load_tokenizer(str(tmp_path))
    assert encoder_of(loaded).encode_prompts([text, "the"])[0] == expected
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    assert again["truncation"] is None and again["padding"] is None
    assert home.definition_sha256(loaded) == home.definition_sha256(byte_level())


def test_splits_at_random_are_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = byte_level()
    expected = made("the quick brown fox")["input_ids"]
    made.backend_tokenizer.model.dropout = 0.5
    made.save_pretrained(tmp_path)
    encoder = encoder_of(load_tokenizer(str(tmp_path)))
    assert all(ids_of(encoder, "the quick brown fox") == expected for _ in range(5))
    assert "at random (dropout)" in caplog.text


def test_a_tokenizer_written_in_python_is_saved_and_loaded(tmp_path: Path) -> None:
    KINDS["of_bytes"](model_max_length=4).save_pretrained(tmp_path)
    encoder = encoder_of(load_tokenizer(str(tmp_path)))
    assert encoder.backend is None and len(ids_of(encoder, "</s> a long text")) == 16
    assert home.require_end(encoder) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "cannot be loaded .*: give the directory that save_pretrained"),
        ({"tokenizer.json": "{"}, "cannot be loaded"),
        ({"tokenizer.json": "{}"}, "cannot be loaded"),
        ({"tokenizer_config.json": "[]"}, "cannot be loaded"),
        (LLAMA, "no tokenizer with words in it"),
        ({"config.json": '{"model_type": "gpt2"}'}, "no tokenizer with words in it"),
        ({"tokenizer.model": "\n\x0exyz", **LLAMA}, "a model of sentencepiece: pip install sentencepiece"),
        (
            {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["x.X", null]}}'},
            "needs code of its own, which is not run",
        ),
    ],
)
def test_what_cannot_be_loaded_is_told(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path))


def test_a_directory_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match="--model /no/such: there is no such directory, .* check the path"):
        load_tokenizer("/no/such", flag="--model")


def test_a_panic_of_the_library_is_told(tmp_path: Path) -> None:
    definition = json.loads(begin_and_end().backend_tokenizer.to_str())
    del definition["post_processor"]["special_tokens"]["<s>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    with pytest.raises(UserError, match="--tokenizer T cannot put its own tokens around a text .*; mend it"):
        encoder_of(load_tokenizer(str(tmp_path)))
    definition["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UserError, match="its tokenizer cannot be loaded .*charsmap"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("it requires the SentencePiece library"), "pip install sentencepiece, or"),
        (
            ValueError("`tiktoken` is required. Install it with `pip install tiktoken`"),
            "pip install tiktoken",
        ),
        (KeyError(), r"\(KeyError\)"),
        (
            OSError("\n\n We couldn't connect\nmore"),
            r"some/name: there is no such directory, and the Hub gave no tokenizer of that name \(We couldn't"
            r" connect\).*HF_HUB_OFFLINE",
        ),
    ],
)
def test_the_remedy_of_a_failed_load(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(UserError, match=message):
        load_tokenizer("some/name")
