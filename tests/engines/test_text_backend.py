"""The copy that encodes texts: made where it is needed, and giving the original's ids."""

from __future__ import annotations

import pytest

from mlpmem_ds.engines.text_backend import definition_of, text_backend

from ..toy_tokenizers import KINDS, SPECIAL, byte_level, lossy, merged


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "of_bytes"])
def test_only_a_tokenizer_that_needs_it_is_copied(kind: str) -> None:
    original = KINDS[kind]().backend_tokenizer
    backend = text_backend(original, set(SPECIAL), parse=False)
    assert (backend.tokenizer is not original) == (kind not in ("byte_level", "begin_and_end", "lossy"))
    assert (backend.counter is not None) == (kind == "lossy")
    assert text_backend(original, set(SPECIAL), parse=True).tokenizer is original


def test_a_bpe_that_takes_whole_words_from_its_vocabulary_does_not_take_special_ones() -> None:
    original = byte_level().backend_tokenizer
    original.model.ignore_merges = True
    original.pre_tokenizer = None  # so that a text is one word
    end = original.token_to_id("<e>")
    original.encode_special_tokens = True
    assert original.encode("<e>").ids == [end]
    ids, dropped = text_backend(original, set(), parse=False).encode(["<e>"])
    assert end not in ids[0] and original.decode(ids[0].tolist()) == "<e>" and dropped == [0]


def test_ids_with_holes_and_added_tokens_keep_their_numbers() -> None:
    original = lossy().backend_tokenizer
    backend = text_backend(original, set(), parse=False)
    # what stands around a character that is left out is joined, as the library does
    rows, dropped = backend.encode(["a<tool>bzabzz", "az<b"])
    assert (list(map(list, rows)), dropped) == (
        [[0, original.token_to_id("<tool>"), 1, 2], [0, 5, 1]],
        [3, 1],
    )
    marked = text_backend(original, {"<tool>"}, parse=False)
    rows, dropped = marked.encode(["a<tool>b"])
    assert (list(map(list, rows)), dropped) == ([[0, 5, 6, 1]], [4])


def test_merges_that_make_a_special_token_leave_its_parts() -> None:
    original = merged().backend_tokenizer
    ids, _ = text_backend(original, set(), parse=False).encode(["<e>"])
    assert [original.id_to_token(number) for number in ids[0]] == ["▁", "<e", ">"]


def test_a_definition_is_that_of_the_rules_and_not_of_the_lengths() -> None:
    first, second = byte_level().backend_tokenizer, byte_level().backend_tokenizer
    second.enable_truncation(5)
    second.enable_padding()
    assert definition_of(first) == definition_of(second)
    second.normalizer = merged().backend_tokenizer.normalizer
    assert definition_of(first) != definition_of(second)
