"""Texts become the ids that transformers gives for the same text with split_special_tokens=True; no special
token comes out of a text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines import tokenizer as home
from mlpmem_ds.engines.tokenizer import TextEncoder, open_encoder
from mlpmem_ds.engines.tokenizer_loading import load_tokenizer

from ..toy_tokenizers import KINDS, SPECIAL, begin_and_end, byte_level, lossy, words

TOKENIZERS = {name: make() for name, make in KINDS.items()}
ENCODERS = {name: open_encoder(made, label="--tokenizer T") for name, made in TOKENIZERS.items()}
PIECES = [
    *SPECIAL, "<wide>", "<tool>", "    ", "</s>", "[CLS]", "[UNK]", "<unk>", "<s>", "<0x0A>",
    "the", "fox", "a", "b", " ", "\n", "é", "日本", "<", "e", ">", "▁", "\x00", "\u2028", "ﬁ",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)


def encoder_of(tokenizer: Any, **changes: Any) -> TextEncoder:
    return open_encoder(tokenizer, label="--tokenizer T", **changes)


def ids_of(encoder: TextEncoder, text: str) -> list[int]:
    return encoder.encode([text])[0].ids


def by_transformers(tokenizer: Any, text: str, **changes: Any) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, **changes)["input_ids"]
    return ids


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_texts_become_the_ids_of_transformers_and_never_a_special_token(kind: str, text: str) -> None:
    tokenizer, encoder = TOKENIZERS[kind], ENCODERS[kind]
    ids, expected = ids_of(encoder, text), by_transformers(tokenizer, text, split_special_tokens=True)
    assert not set(ids) & encoder.special_ids
    if (
        not set(expected) & encoder.special_ids and "<unk>" not in text
    ):  # where transformers gives none itself
        assert ids == expected
    parsed = open_encoder(tokenizer, label="T", special_tokens="parse")
    assert ids_of(parsed, text) == by_transformers(tokenizer, text, split_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_begins_as_a_text_of_the_tokenizer_does_and_ends_once(kind: str) -> None:
    tokenizer, encoder = TOKENIZERS[kind], ENCODERS[kind]
    text = "a b" if kind == "lossy" else "the fox"
    whole, bare = tokenizer(text)["input_ids"], by_transformers(tokenizer, text)
    document = encoder.encode_documents([text])[0].ids.tolist()
    assert document.count(tokenizer.eos_token_id) == 1 and document[-1] == tokenizer.eos_token_id
    assert document[:-1] == whole[: len(encoder.begin_ids) + len(bare)]
    assert encoder.encode_prompts([text]) == [document[:-1]]
    assert len(encoder.begin_ids) == {"begin_and_end": 2, "word_piece": 1}.get(kind, 0)
    assert max(document) < encoder.vocab_size


@pytest.mark.parametrize("kind", ["unigram", "merged", "word_piece", "words"])
def test_special_tokens_among_the_words_are_text_where_transformers_makes_them_special(kind: str) -> None:
    tokenizer, encoder = TOKENIZERS[kind], ENCODERS[kind]
    text = "the <e> fox <mask>"
    assert tokenizer.eos_token_id in by_transformers(tokenizer, text, split_special_tokens=True)
    encoded = encoder.encode([text])[0]
    assert not set(encoded.ids) & {tokenizer.eos_token_id, tokenizer.mask_token_id}
    if kind == "words":  # it has no other words for it
        assert encoded.num_unknown == 2
    else:
        pieces = "".join(tokenizer.convert_ids_to_tokens(encoded.ids))
        assert pieces.translate({ord("▁"): " ", ord("#"): None}).replace(" ", "") == text.replace(" ", "")


def test_what_the_configuration_calls_special_is_special_though_the_file_does_not_mark_it() -> None:
    backend = byte_level().backend_tokenizer
    backend.add_tokens([AddedToken("<|im_end|>", special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    ids = ids_of(encoder_of(tokenizer), "it says <|im_end|> and <tool> too")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "it says <|im_end|> and <tool> too"
    assert tokenizer.convert_tokens_to_ids("<tool>") in ids  # an added token that is not special stays one


def test_a_call_of_transformers_between_two_texts_changes_nothing() -> None:
    tokenizer = byte_level()
    encoder = encoder_of(tokenizer)
    first = ids_of(encoder, "<e> <tool>")
    assert tokenizer("<e>")["input_ids"] == [tokenizer.eos_token_id]
    assert ids_of(encoder, "<e> <tool>") == first and tokenizer.eos_token_id not in first


def test_characters_without_a_token_are_counted() -> None:
    encoder = ENCODERS["lossy"]
    assert encoder.encode(["ab<tool>yzé <e>"])[0] == (
        by_transformers(TOKENIZERS["lossy"], "ab<tool>yzé <e>", split_special_tokens=True), 0, 3
    )  # fmt: skip
    with pytest.raises(UserError, match="prompt 2: --tokenizer T has no token for 2 of its characters"):
        encoder.encode_prompts(["ab", "yz"], ["prompt 1", "prompt 2"])
    assert encoder_of(lossy(), special_tokens="parse").encode(["z<e>"])[0][1:] == (0, 1)
    assert ENCODERS["words"].encode(["the thing"])[0].num_unknown == 1
    assert [one[1:3] for one in ENCODERS["words"].encode_documents(["the thing", "the"])] == [(1, 0), (0, 0)]
    assert encoder.encode_documents(["ayz"])[0][1:3] == (0, 2)
    assert ENCODERS["byte_level"].encode(["日本 \x00"])[0][1:] == (0, 0)


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 0, "b": 1, "<e>": 2}),
        models.WordPiece({"a": 0, "b": 1, "<e>": 2}),
        models.Unigram([("a", -1.0), ("b", -1.0), ("<e>", -1.0)]),
        models.BPE({"a": 0, "b": 1, "<e>": 2}, [], unk_token="none"),
    ],
)
def test_a_text_without_tokens_is_refused_by_name(model: Any) -> None:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = encoder_of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>"))
    assert home.require_end(encoder) == 2
    assert ids_of(encoder, "a b") == [0, 1]
    with pytest.raises(UserError, match=r"two\.txt: --tokenizer T has no token for some of this text"):
        encoder.encode(["a b", "a c"], ["one.txt", "two.txt"])
    with pytest.raises(UserError, match=r"text 2 holds half of a surrogate pair \(U\+D83D at character 1\)"):
        encoder.encode(["a", "a\ud83d"])


def test_begin_tokens_that_depend_on_the_text_are_refused() -> None:
    class Counting(PreTrainedTokenizerFast):
        def __call__(self, text: Any, **changes: Any) -> Any:
            encoded = super().__call__(text, **changes)
            if changes.get("add_special_tokens", True):
                encoded["input_ids"] = [len(text), *encoded["input_ids"]]
            return encoded

    tokenizer = Counting(tokenizer_object=byte_level().backend_tokenizer, eos_token="<e>")
    with pytest.raises(UserError, match="--tokenizer T puts tokens around a text that depend on the text"):
        encoder_of(tokenizer)


def test_a_chat_that_begins_and_ends_itself_does_so_once() -> None:
    tokenizer = begin_and_end()
    first, second, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "<lang>", "<e>"))
    chat = encoder_of(tokenizer, special_tokens="parse")
    ids = ids_of(chat, "<s><lang>the fox<e>")
    for rendered in ("<s><lang>the fox<e>", "the fox", "the fox<e>"):
        assert chat.encode_documents([rendered])[0].ids.tolist() == ids
    assert chat.encode_prompts(["<s><lang>the"])[0].count(first) == 1
    text = encoder_of(tokenizer)
    document = text.encode_documents(["<s><lang>the fox<e>"])[0].ids.tolist()
    assert document.count(first) == document.count(end) == 1 and document[:2] == [first, second]
    assert text.describe_bounds() == (
        f"each document begins with '<s>' ({first}) '<lang>' ({second}) and ends with '<e>' ({end})"
    )


def test_flags_and_post_processors_say_what_begins_a_text(tmp_path: Path) -> None:
    made = byte_level(bos_token="<mask>")
    made.backend_tokenizer.post_processor = processors.RobertaProcessing(("<e>", 0), ("<pad>", 1))
    assert encoder_of(made).begin_ids == (1,)
    made.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<mask> $A", special_tokens=[("<mask>", 2)]),
        ]
    )
    assert encoder_of(made).begin_ids == (2,)


def test_end_tokens_that_cannot_end_a_document_are_refused() -> None:
    none = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    with pytest.raises(UserError, match="--tokenizer T has no end-of-text token: set eos_token"):
        home.require_end(encoder_of(none))
    unknown = encoder_of(words(eos_token="<unk>"))
    with pytest.raises(UserError, match=r"its end token '<unk>' \(0\) is also what unknown text becomes"):
        home.require_end(unknown)
    letter = encoder_of(lossy(eos_token="e"))
    with pytest.raises(UserError, match=r"its end token 'e' \(4\) is also what that spelling in a text"):
        home.require_end(letter)
    with pytest.raises(UserError, match="text 1: --tokenizer T writes some of this text with its end token"):
        letter.encode(["e"])
    with pytest.raises(UserError, match=r"b\.txt: --tokenizer T writes some of this text with its end token"):
        letter.encode_documents(["ab", "be"], ["a.txt", "b.txt"])
    assert home.require_end(encoder_of(byte_level(pad_token="<e>", bos_token="<e>"))) == 0


def test_equal_words_with_other_rules_are_another_definition() -> None:
    first, second = byte_level(), byte_level()
    second.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert first.get_vocab() == second.get_vocab()
    assert home.definition_sha256(first) != home.definition_sha256(second)
    assert home.definition_sha256(first) == home.definition_sha256(byte_level(model_max_length=9))
    assert home.definition_sha256(first) != home.definition_sha256(begin_and_end())


def test_flags_of_the_configuration_put_tokens_around_a_text(tmp_path: Path) -> None:
    made = byte_level(bos_token="<mask>", add_bos_token=True, add_eos_token=True)
    made.save_pretrained(tmp_path)
    encoder = encoder_of(load_tokenizer(str(tmp_path)))
    assert encoder.begin_ids == (2,)
    assert encoder.encode_documents(["a b"])[0].ids.tolist() == made("a b")["input_ids"]


def test_a_hundred_thousand_spelled_special_tokens_take_a_moment() -> None:
    for kind in ("byte_level", "unigram", "merged", "words"):
        start = time.monotonic()
        encoded = ENCODERS[kind].encode(["the <e> <mask> fox " * 50_000])[0]
        assert not set(encoded.ids) & ENCODERS[kind].special_ids
        assert time.monotonic() - start < 20, kind
