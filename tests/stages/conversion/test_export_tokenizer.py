"""The tokenizer of an export: the order of choice, and one that begins a text otherwise is refused."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.tokenizer import definition_sha256
from mlpmem_ds.formats.corpus import TokenizerFacts, read_corpus_manifest
from mlpmem_ds.stages.conversion.export_tokenizer import check_begins, choose_tokenizer, rules_sha256

from ...toy_tokenizers import begin_and_end, byte_level


def _facts(corpus_dir: Path, **changes: Any) -> TokenizerFacts:
    return dataclasses.replace(read_corpus_manifest(corpus_dir).tokenizer, **changes)


def test_a_flag_comes_before_the_base_and_the_base_before_the_corpus(
    corpus_dir: Path, base_dir: Path, tmp_path: Path
) -> None:
    own = corpus_dir / "tokenizer"
    base = shutil.copytree(base_dir, tmp_path / "base")
    assert choose_tokenizer(str(own), str(base), None, None)[1] == f"--tokenizer {own}"
    assert choose_tokenizer(None, str(base), corpus_dir, "memory")[1] == f"the corpus's tokenizer {own}"
    shutil.copytree(own, base, dirs_exist_ok=True)
    assert choose_tokenizer(None, str(base), corpus_dir, "memory")[1] == f"the tokenizer of --model {base}"


def test_where_there_is_none_the_message_says_which_to_give(base_dir: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer: give --tokenizer, a directory or Hub name"):
        choose_tokenizer(None, str(base_dir), None, None)
    with pytest.raises(UserError, match="the corpus of --checkpoint m is not on this disk: give --tokenizer"):
        choose_tokenizer(None, str(base_dir), None, "--checkpoint m")


def test_other_tokens_before_a_text_are_refused(corpus_dir: Path) -> None:
    facts = _facts(corpus_dir, definition_sha256="0" * 64, begin_of_document_ids=(7,))
    with pytest.raises(UserError, match=r"--tokenizer t puts the tokens \[\] before a text.*with \[7\]"):
        check_begins(byte_level(), facts, "--tokenizer t")


def test_other_rules_are_a_warning_and_the_same_are_none(
    corpus_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_level()
    with caplog.at_level(logging.WARNING):
        check_begins(tokenizer, _facts(corpus_dir, definition_sha256=definition_sha256(tokenizer)), "t")
        assert not caplog.records
        other = _facts(corpus_dir, definition_sha256="0" * 64, begin_of_document_ids=())
        check_begins(tokenizer, other, "--tokenizer t")
    assert "--tokenizer t has the words of the corpus's tokenizer and other rules" in caplog.text


def test_rules_are_more_than_the_vocabulary() -> None:
    plain, again, chatty = byte_level(), byte_level(), byte_level(chat_template="{{ messages }}")
    assert rules_sha256(plain) == rules_sha256(again)
    assert len({rules_sha256(each) for each in (plain, chatty, begin_and_end())}) == 3
