"""A tokenizer of the library `tokenizers` as texts need it: what its setting `encode_special_tokens` leaves
undone, done on a copy.

The library's setting passes over special tokens in a text where it looks for added tokens. Three things
remain, and where a tokenizer has one of them, a copy with another definition encodes in its stead:
- **Words.** A special token may be a word of the model's own vocabulary (Unigram, WordLevel, WordPiece, a BPE
  whose merges make it), so that text still becomes it. In the copy that word has a name which no text holds.
- **Marks.** A token that the configuration calls special may not be marked so in tokenizer.json.
- **Loss.** A BPE without an unknown token, and not of bytes, leaves out characters that it does not have. In
  another copy they become a token of their own, so that they can be counted.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel


@dataclass(frozen=True, kw_only=True)
class TextBackend:
    """The library's tokenizer that encodes texts."""

    tokenizer: Any
    definition_sha256: str
    """as `definition_of` the original"""
    parse: bool
    """whether a spelled special token becomes that token"""
    unknown_id: int | None
    """of the model's unknown token, as the original numbers it"""
    ids: tuple[int, ...] | None = None
    """the original's id of each id; None: all are the same"""
    counter: Any | None = None
    """the same with an unknown token, for a tokenizer that leaves characters out"""
    counted_id: int | None = None
    """the id of that token"""

    def encode(self, texts: Sequence[str]) -> tuple[list[array[int]], list[int]]:
        """(ids of each text, characters of each that are left out), without begin and end tokens."""
        rows = _encode(self.tokenizer, texts, self.parse)
        if self.ids is not None:
            rows = [array("I", (self.ids[number] for number in row)) for row in rows]
        if self.counter is None:
            return rows, [0] * len(rows)
        counted = _encode(self.counter, texts, self.parse)
        return rows, [sum(number == self.counted_id for number in row) for row in counted]


def _encode(tokenizer: Any, texts: Sequence[str], parse: bool) -> list[array[int]]:
    # A call of the tokenizer by transformers sets it anew, so it is set at each call.
    tokenizer.encode_special_tokens = not parse
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [array("I", encoding.ids) for encoding in encodings]  # lists of a batch would leave the cache


def text_backend(original: Any, special: set[str], *, parse: bool) -> TextBackend:
    """What encodes texts as `original` would; the original itself where it does all of it.

    Args:
        original: of `tokenizers`, without truncation and padding.
        special: tokens that its configuration calls special, besides those that it marks itself.
        parse: whether a spelled special token becomes that token.
    """
    definition = json.loads(original.to_str())
    sha256 = _sha256_of(definition)
    model = definition["model"]
    unknown_id = _unknown_id(original, model)
    tokenizer, ids, changed, names = original, None, False, dict[str, str]()
    if not parse:
        for token in definition["added_tokens"]:
            if token["content"] in special and not token["special"]:
                token["special"] = changed = True
        marked = {token["content"] for token in definition["added_tokens"] if token["special"]}
        names = _rename(model, marked | special)
    if changed or names:
        tokenizer = Tokenizer.from_str(json.dumps(definition))
        ids = _former_ids(original, tokenizer, names)
    counter, counted_id = None, _mark_dropped(model, definition)
    if counted_id is not None:
        counter = Tokenizer.from_str(json.dumps(definition))
    return TextBackend(
        tokenizer=tokenizer,
        definition_sha256=sha256,
        parse=parse,
        unknown_id=unknown_id,
        ids=ids,
        counter=counter,
        counted_id=counted_id,
    )


def _former_ids(original: Any, copy: Any, names: dict[str, str]) -> tuple[int, ...] | None:
    """The original's id of each id of the copy; None where no text can tell the difference."""
    numbers = original.get_vocab()
    former = {name: token for token, name in names.items()}
    ids = list(range(max(copy.get_vocab().values()) + 1))
    for token, number in copy.get_vocab().items():
        # A special token that was a word has two entries in the copy, of which texts reach neither.
        ids[number] = numbers[former.get(token, token)]
    ordinary = (number for token, number in copy.get_vocab().items() if token not in names)
    return None if all(ids[number] == number for number in ordinary) else tuple(ids)


def definition_of(original: Any) -> str:
    """SHA-256 of all that decides the ids of a text; not of how its file is laid out."""
    return _sha256_of(json.loads(original.to_str()))


def _sha256_of(definition: dict[str, Any]) -> str:
    # Not core's canonical JSON, which takes seconds for a large vocabulary.
    deciding = {**definition, "truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _unknown_id(original: Any, model: dict[str, Any]) -> int | None:
    if model.get("type") == "Unigram":
        number = model.get("unk_id")
        return None if number is None else int(number)
    token = model.get("unk_token")
    return None if token is None else original.token_to_id(token)


def _rename(model: dict[str, Any], special: set[str]) -> dict[str, str]:
    """Give words of the model that are special tokens names that no text holds; token → name.

    A single character stays what it is: it may be the only way to write itself.
    """
    vocabulary = model["vocab"]
    words = {piece for piece, _ in vocabulary} if isinstance(vocabulary, list) else set(vocabulary)
    reached = {token for token in special & words if len(token) > 1}
    if model.get("type") == "BPE" and not model.get("ignore_merges"):
        reached &= {_merged(model, *pair) for pair in _pairs(model)}
    names = {token: _unreachable(token) for token in reached}
    if not names:
        return {}
    if isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
        return names
    model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [
            list(pair) for pair in _pairs(model) if not reached & {*pair, _merged(model, *pair)}
        ]
    return names


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [(left, right) for left, right in model["merges"]]


def _merged(model: dict[str, Any], left: str, right: str) -> str:
    return left + right[len(model.get("continuing_subword_prefix") or "") :]


def _mark_dropped(model: dict[str, Any], definition: dict[str, Any]) -> int | None:
    """Give a BPE that leaves characters out an unknown token, whose id is returned; None for others."""
    if model.get("type") != "BPE" or model.get("unk_token") is not None:
        return None
    vocabulary = model["vocab"]
    steps = json.dumps([definition.get("normalizer"), definition.get("pre_tokenizer")])
    if '"ByteLevel"' in steps and set(ByteLevel.alphabet()) <= set(vocabulary):
        return None
    if model.get("byte_fallback") and {f"<0x{byte:02X}>" for byte in range(256)} <= set(vocabulary):
        return None
    marker, number = _unreachable("dropped"), max(vocabulary.values(), default=-1) + 1
    vocabulary[marker] = number
    model["unk_token"], model["fuse_unk"] = marker, False
    return number


def _unreachable(token: str) -> str:
    """A name that no text holds, longer than any word that WordPiece looks at."""
    return "".join(hashlib.sha256(f"{part} {token}".encode()).hexdigest() for part in range(2))
