"""Documents of a corpus: begin tokens, the tokens of their text, one end token, by all tokenizers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import CorpusSplit, open_corpus
from mlpmem_ds.stages.corpus import prepare_corpus
from mlpmem_ds.stages.corpus.corpus_tokenizer import train_tokenizer

from ...toy_tokenizers import KINDS, lossy

TEXTS = {
    "page.txt": "a text ends with <|endoftext|> or <e> or </s>, and <pad> <mask> <wide> are text; <tool>",
    "words.txt": "the quick fox a b " * 30,
    "others.txt": "日本 été \x00 [CLS] [SEP] <s> <lang>",
}


def prepare(place: Path, tokenizer: str, texts: dict[str, str] = TEXTS, **changes: Any) -> CorpusSplit:
    (place / "text").mkdir(exist_ok=True)
    for name, text in texts.items():
        (place / "text" / name).write_bytes(text.encode())
    settings = {"block_size": 4, "stride": 4, **changes}
    prepare_corpus.run(
        prepare_corpus.Config(
            input=(str(place / "text"),), tokenizer=tokenizer, output=place / "corpus", **settings
        ),
        World(),
    )
    return open_corpus(place / "corpus")


def documents_of(corpus: CorpusSplit) -> dict[str, list[int]]:
    stops = corpus.document_stops.tolist()
    rows = zip(corpus.documents, [0, *stops[:-1]], stops, strict=True)
    return {document["name"]: corpus.tokens(start, stop).tolist() for document, start, stop in rows}


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_is_what_the_tokenizer_makes_of_its_text(tmp_path: Path, kind: str) -> None:
    tokenizer = KINDS[kind](model_max_length=8)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    corpus = prepare(tmp_path, str(tmp_path / "tokenizer"))
    end, facts = tokenizer.eos_token_id, corpus.manifest.tokenizer
    begin = list(facts.begin_of_document_ids)
    assert len(begin) == {"begin_and_end": 2, "word_piece": 1}.get(kind, 0)
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for name, ids in documents_of(corpus).items():
        expected = tokenizer(TEXTS[name], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids[: len(begin)] == begin and ids[-1] == end and ids.count(end) == 1
        if not control & set(expected):
            assert ids[len(begin) : -1] == expected
    tokens = corpus.tokens(0, corpus.num_tokens)
    assert int((tokens == end).sum()) == len(TEXTS)
    for beginning in begin:
        assert int((tokens == beginning).sum()) == len(TEXTS)
    train = corpus.manifest.splits["train"]
    unknown = int((tokens == tokenizer.unk_token_id).sum()) if tokenizer.unk_token_id is not None else 0
    assert train.num_unknown == (0 if kind == "of_bytes" else unknown)
    assert (train.num_dropped > 0) == (kind == "lossy")
    again = AutoTokenizer.from_pretrained(corpus.tokenizer_path)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_chats_are_parsed_where_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = KINDS["begin_and_end"]()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    caplog.set_level(logging.INFO)
    texts = {"a.txt": "<s><lang>the fox<e>the dog<e>", "b.txt": "the fox"}
    corpus = prepare(tmp_path, str(tmp_path / "tokenizer"), texts, special_tokens="parse")
    for name, ids in documents_of(corpus).items():
        whole = tokenizer(texts[name].removeprefix("<s><lang>").removesuffix("<e>"))["input_ids"]
        assert ids == whole
    assert corpus.manifest.tokenizer.special_tokens == "parse"
    assert "each document begins with '<s>'" in caplog.text
    with pytest.raises(UserError, match="--special-tokens was 'parse', now 'text'"):
        prepare(tmp_path, str(tmp_path / "tokenizer"), texts)


def test_text_without_a_token_is_told_and_refused_where_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lossy().save_pretrained(tmp_path / "tokenizer")
    texts = {"a.txt": "ab ab ab", "b.txt": "ab xyz"}
    with pytest.raises(UserError, match=r"--strict: --tokenizer .* has no token for 2 characters of b\.txt"):
        prepare(tmp_path, str(tmp_path / "tokenizer"), texts, strict=True)
    assert not (tmp_path / "corpus" / "manifest.json").exists()
    prepare(tmp_path, str(tmp_path / "tokenizer"), texts)
    assert "has no token for 2 characters of the text" in caplog.text
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest["splits"]["train"]["num_dropped"] == 2
    (tmp_path / "other").mkdir()
    KINDS["words"]().save_pretrained(tmp_path / "other" / "tokenizer")
    prepare(tmp_path / "other", str(tmp_path / "other" / "tokenizer"), {"a.txt": "the fox the thing"})
    assert "1 of 5 tokens (20 %) are its unknown token" in caplog.text


def test_the_rules_of_a_tokenizer_are_of_the_identity(tmp_path: Path) -> None:
    tokenizer = KINDS["byte_level"]()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    prepare(tmp_path, str(tmp_path / "tokenizer"))
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"inputs\.tokenizer"):
        prepare(tmp_path, str(tmp_path / "tokenizer"))


def test_a_trained_tokenizer_ends_no_document_within_its_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = {f"{n}.txt": "it is <|endoftext|> <|endoftext|>\n" * 20 for n in range(3)}
    corpus = prepare(tmp_path, "train:4096", texts)
    tokens = corpus.tokens(0, corpus.num_tokens)
    assert int((tokens == corpus.end_of_document_id).sum()) == 3
    assert "--tokenizer train:4096: the training split holds words for" in caplog.text
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_path)
    ids = np.array(next(iter(documents_of(corpus).values())))
    assert tokenizer.decode(ids[:-1]) == texts["0.txt"]


def test_a_tokenizer_of_few_texts_is_as_large_as_they_allow() -> None:
    assert len(train_tokenizer(270, ["many words, and many other words, in many texts"] * 20)) == 270
    assert len(train_tokenizer(300, [])) == 257


@pytest.mark.parametrize("size", ["", "12", "²", "1e4", "999999999999999999999", "-5"])
def test_a_size_that_is_none_is_refused(tmp_path: Path, size: str) -> None:
    with pytest.raises(UserError, match="needs at least 257 entries"):
        prepare(tmp_path, f"train:{size}")


def test_a_corpus_is_not_continued_with_another_end_token(tmp_path: Path) -> None:
    KINDS["byte_level"]().save_pretrained(tmp_path / "tokenizer")
    prepare(tmp_path, str(tmp_path / "tokenizer"))
    settings = tmp_path / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": "<mask>"}))
    with pytest.raises(UserError, match="tokenizer"):
        prepare(tmp_path, str(tmp_path / "tokenizer"))


def test_a_tokenizer_with_several_chat_templates_keeps_them(tmp_path: Path) -> None:
    """transformers writes all but the first into a folder."""
    tokenizer = KINDS["byte_level"]()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    corpus = prepare(tmp_path, str(tmp_path / "tokenizer"))
    again = AutoTokenizer.from_pretrained(corpus.tokenizer_path)
    assert again.chat_template == tokenizer.chat_template
    assert "tokenizer/additional_chat_templates/tool_use.jinja" in {
        record["name"] for record in json.loads((tmp_path / "corpus" / "manifest.json").read_text())["files"]
    }
