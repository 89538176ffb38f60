"""What kind of token each position predicts: the groups by which `evaluate` says where an arm wins and loses.

V entries of the vocabulary, N positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

KINDS = (
    "word start",
    "capitalized word start",
    "word continuation",
    "number",
    "punctuation",
    "whitespace",
    "end of document",
    "part of a character",
)
_WORD_START, _CAPITAL, _CONTINUATION, _NUMBER, _PUNCTUATION, _SPACE, _END, _PART = range(len(KINDS))
_SPACE_MARKS = ("Ġ", "▁")  # how byte-level and sentence-piece vocabularies write a space in front


@dataclass(frozen=True, kw_only=True)
class VocabularyKinds:
    """What each entry of a vocabulary looks like, regardless of what stands before it."""

    kinds_V: np.ndarray
    """int64: index into KINDS; letters count as a continuation, which a position may make a word's start"""
    is_spaced_V: np.ndarray
    """bool: begins with white space"""
    is_capital_V: np.ndarray
    """bool: its first letter is a capital"""
    ends_in_word_V: np.ndarray
    """bool: ends with a letter, a digit or an underscore, so that letters after it go on with the word"""


def read_vocabulary_kinds(
    tokenizer_path: Path, vocab_size: int, end_of_document_id: int
) -> VocabularyKinds | None:
    """The kinds of a tokenizer directory's entries; None where it has no tokenizer.json to decode single
    tokens with."""
    path = tokenizer_path / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = Tokenizer.from_file(str(path))
    kinds = VocabularyKinds(
        kinds_V=np.full(vocab_size, _PART),
        is_spaced_V=np.zeros(vocab_size, dtype=bool),
        is_capital_V=np.zeros(vocab_size, dtype=bool),
        ends_in_word_V=np.zeros(vocab_size, dtype=bool),
    )
    for entry in range(vocab_size):
        symbol = tokenizer.id_to_token(entry)
        if symbol is None:
            continue
        text = tokenizer.decode([entry], skip_special_tokens=False)
        word = text.strip()
        kinds.kinds_V[entry] = _kind_of_text(text, word)
        kinds.is_spaced_V[entry] = text[:1].isspace() or symbol.startswith(_SPACE_MARKS)
        kinds.is_capital_V[entry] = word[:1].isupper()
        kinds.ends_in_word_V[entry] = text[-1:].isalnum() or text[-1:] == "_"
    kinds.kinds_V[end_of_document_id] = _END
    kinds.ends_in_word_V[end_of_document_id] = False
    return kinds


def kinds_of_positions(kinds: VocabularyKinds, tokens_N: np.ndarray, values_N: np.ndarray) -> np.ndarray:
    """int64 [N], indices into KINDS, of the values that follow the tokens: letters after letters continue a
    word."""
    kinds_N = kinds.kinds_V[values_N]
    is_letters_N = kinds_N == _CONTINUATION
    starts_N = is_letters_N & (kinds.is_spaced_V[values_N] | ~kinds.ends_in_word_V[tokens_N])
    kinds_N = np.where(starts_N, _WORD_START, kinds_N)
    return np.where(starts_N & kinds.is_capital_V[values_N], _CAPITAL, kinds_N)


def _kind_of_text(text: str, word: str) -> int:
    if "\ufffd" in text or not text:
        return _PART
    if not word:
        return _SPACE
    if word[0].isdigit():
        return _NUMBER
    return _CONTINUATION if word[0].isalpha() or (word[0] == "_" and word.strip("_")) else _PUNCTUATION
