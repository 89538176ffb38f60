"""Texts → ids: every stage encodes here what comes from users, with a tokenizer of tokenizer_loading.py.

- Texts are encoded whole.
- Text is text: a spelling such as `<|endoftext|>` in it becomes no control token, as transformers has it with
  `split_special_tokens=True` (text_backend.py: where the library's setting is not enough). With
  special_tokens="parse" it becomes one, as transformers has it by default: for rendered chats.
- What the tokenizer puts before a text (begin tokens) stands before each document and each prompt; what it
  puts after one does not. A document ends with the one end token.
- What has no token is an error, or is counted.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mlpmem_ds.core.errors import UserError, first_line
from mlpmem_ds.core.files import content_hash
from mlpmem_ds.engines.text_backend import TextBackend, definition_of, text_backend
from mlpmem_ds.engines.tokenizer_loading import backend_of, library_fault
from mlpmem_ds.formats.corpus import SpecialTokens, vocabulary_sha256

_PROBES = ("x", "a b", "\n", "the 2nd probe, a longer one.", "é")
_NO_TOKEN_PROBES = ("\ue000", "\U0010fffd")  # private characters, which no vocabulary of words holds


class Encoded(NamedTuple):
    """A text's ids, without begin and end tokens, and what of it is not in them."""

    ids: list[int]
    num_unknown: int
    """ids that are the unknown token"""
    num_dropped: int
    """characters that the tokenizer has no token for, and leaves out"""


class EncodedDocument(NamedTuple):
    """A document's ids, uint32, from its begin tokens to its end token; the rest as in `Encoded`.

    Of a conversation (chat_template.py) also which ids are answers, and UTF-8 bytes of its text and of its
    answers.
    """

    ids: np.ndarray
    num_unknown: int
    num_dropped: int
    is_answer_n: np.ndarray | None = None
    num_bytes: int = 0
    num_answer_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """Texts → ids, by the rules above; `open_encoder` makes one."""

    tokenizer: Any
    """of transformers, as it was loaded"""
    label: str
    """for messages, such as `--tokenizer DIR`"""
    special_tokens: SpecialTokens
    begin_ids: tuple[int, ...]
    """put before each text; often none"""
    end_id: int | None
    """put after each document; None where the tokenizer has no end token"""
    unknown_id: int | None
    special_ids: frozenset[int]
    """ids of special tokens, without the unknown token: no text becomes one of them, unless it is parsed"""
    backend: TextBackend | None = field(repr=False)
    """None: a tokenizer that is written in Python"""

    def encode(self, texts: Sequence[str], names: Sequence[str] | None = None) -> list[Encoded]:
        """The ids of each text, whole, without begin and end tokens.

        Args:
            texts: any text.
            names: of the texts, for messages (default: `text 1`, …).

        Raises:
            UserError: a text cannot be encoded, or holds the end token and nothing else can stand for it.
        """
        rows, dropped = self._ids(texts, names)
        encoded = []
        for number, (ids, count) in enumerate(zip(rows, dropped, strict=True)):
            unknown = self._count_unknown(np.asarray(ids), names, number)
            encoded.append(Encoded(ids.tolist(), unknown, count))
        return encoded

    def encode_documents(
        self, texts: Sequence[str], names: Sequence[str] | None = None
    ) -> list[EncodedDocument]:
        """Each text as a document: its begin tokens, its ids, and the end token once.

        Raises:
            UserError: as `encode`.
        """
        assert self.end_id is not None
        rows, dropped = self._ids(texts, names)
        documents = []
        for number, (ids, count) in enumerate(zip(rows, dropped, strict=True)):
            begin = self._begin_of(ids)
            row = array("I", begin)
            row.extend(ids)
            if self.special_tokens == "text" or not ids or ids[-1] != self.end_id:
                row.append(self.end_id)
            all_ids = np.frombuffer(row, dtype=np.uint32)
            unknown = self._count_unknown(all_ids[len(begin) : -1], names, number)
            documents.append(EncodedDocument(all_ids, unknown, count))
        return documents

    def encode_prompts(self, texts: Sequence[str], names: Sequence[str] | None = None) -> list[list[int]]:
        """The ids that a model reads before it goes on with each text: begin tokens, then the text.

        A rendered chat that begins with the begin tokens itself is not given them again.

        Raises:
            UserError: as `encode`; also for a text of which the tokenizer would leave characters out.
        """
        rows = []
        for number, one in enumerate(self.encode(texts, names)):
            if one.num_dropped:
                raise UserError(
                    f"{_name_of(names, number)}: {self.label} has no token for {one.num_dropped} of its"
                    " characters: leave them out, or use a model whose tokenizer has them"
                )
            rows.append([*self._begin_of(one.ids), *one.ids])
        return rows

    @cached_property
    def vocab_size(self) -> int:
        """The largest id + 1."""
        return vocab_size(self.tokenizer)

    @cached_property
    def vocabulary_sha256(self) -> str:
        return vocabulary_sha256(self.tokenizer)

    @cached_property
    def definition_sha256(self) -> str:
        return definition_sha256(self.tokenizer, self.backend)

    @cached_property
    def documents_sha256(self) -> str:
        """What two encoders must share to give the same ids for every document: the rules of the text, and
        what the configuration next to them calls the begin, end and special tokens."""
        special = sorted(self.special_ids)
        return content_hash([self.definition_sha256, list(self.begin_ids), self.end_id, special])

    def describe_bounds(self) -> str:
        """In words: how a document begins and ends."""
        begin = " ".join(map(self._spelling, self.begin_ids))
        end = "" if self.end_id is None else f"ends with {self._spelling(self.end_id)}"
        return f"each document {f'begins with {begin} and ' if begin else ''}{end}"

    def _ids(
        self, texts: Sequence[str], names: Sequence[str] | None = None
    ) -> tuple[list[array[int]], list[int]]:
        """(ids of each text, characters of each that are left out)."""
        try:
            return self._encode(texts)
        except BaseException as error:
            raise self._refusal(texts, names, library_fault(error)) from error

    def _encode(self, texts: Sequence[str]) -> tuple[list[array[int]], list[int]]:
        if self.backend is not None:
            return self.backend.encode(texts)
        lists = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            truncation=False,
            padding=False,
            verbose=False,
            split_special_tokens=self.special_tokens == "text",
        )["input_ids"]
        return [array("I", ids) for ids in lists], [0] * len(lists)

    def _count_unknown(self, ids_n: np.ndarray, names: Sequence[str] | None, number: int) -> int:
        """How many ids of a text are the unknown token.

        Raises:
            UserError: the text became the end token.
        """
        if self.special_tokens == "text" and self.end_id is not None and (ids_n == self.end_id).any():
            raise UserError(
                f"{_name_of(names, number)}: {self.label} writes some of this text with its end token"
                f" {self._spelling(self.end_id)}, so that the document would end there: give a tokenizer"
                " whose eos_token stands in no text and is not its unknown token"
            )
        return 0 if self.unknown_id is None else int(np.count_nonzero(ids_n == self.unknown_id))

    def _refusal(self, texts: Sequence[str], names: Sequence[str] | None, error: BaseException) -> UserError:
        """What to say of the first text that cannot be encoded."""
        for number, text in enumerate(texts):
            try:
                self._encode([text])
            except BaseException as own:
                name, reason = _name_of(names, number), first_line(library_fault(own))
                if any("\ud800" <= character <= "\udfff" for character in text):
                    return UserError(
                        f"{name} holds half of a surrogate pair ({_first_surrogate(text)}), which is no text:"
                        " remove it, or write the text as UTF-8"
                    )
                return UserError(
                    f"{name}: {self.label} has no token for some of this text, and no unknown token to stand"
                    f" for it ({reason}): give a tokenizer that can write any text, such as a byte-level one"
                    " (train:VOCAB makes one)"
                )
        return UserError(f"{self.label} cannot encode these texts ({first_line(error)})")

    def _begin_of(self, ids: Sequence[int]) -> tuple[int, ...]:
        given = tuple(ids[: len(self.begin_ids)]) == self.begin_ids
        return () if self.special_tokens == "parse" and given else self.begin_ids

    def _spelling(self, number: int | None) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens(number)!r} ({number})"


def open_encoder(tokenizer: Any, *, label: str, special_tokens: SpecialTokens = "text") -> TextEncoder:
    """The encoder of a tokenizer that `load_tokenizer` gave.

    Args:
        tokenizer: of transformers.
        label: the flag and its value, for the messages.
        special_tokens: what a spelled special token is.

    Raises:
        UserError: what it puts before a text depends on the text.
    """
    named = {str(token) for token in tokenizer.all_special_tokens}
    backend = backend_of(tokenizer)
    try:
        made = None if backend is None else text_backend(backend, named, parse=special_tokens == "parse")
    except Exception as error:  # tokenizers raises plain exceptions, such as for merges of no words
        raise UserError(
            f"{label}: its tokenizer contradicts itself ({first_line(error)}): give the directory that"
            " save_pretrained of the tokenizer wrote"
        ) from error
    special = {number for token, number in tokenizer.get_vocab().items() if token in named}
    special |= {
        number for number, token in tokenizer.added_tokens_decoder.items() if getattr(token, "special", False)
    }
    unknown = tokenizer.unk_token_id if made is None else made.unknown_id
    return TextEncoder(
        tokenizer=tokenizer,
        label=label,
        special_tokens=special_tokens,
        begin_ids=_begin_ids(tokenizer, label),
        end_id=tokenizer.eos_token_id,
        unknown_id=unknown,
        special_ids=frozenset(special - {unknown}),
        backend=made,
    )


def require_end(encoder: TextEncoder) -> int:
    """The end token's id.

    Raises:
        UserError: the tokenizer has none, or one that text becomes.
    """
    end = encoder.end_id
    remedy = "set eos_token in its tokenizer_config.json (of the Hub, in that of a copy in a directory)"
    if end is None:
        raise UserError(f"{encoder.label} has no end-of-text token: {remedy}")
    if encoder.special_tokens == "text":
        spelled = str(encoder.tokenizer.eos_token)
        probes = {**dict.fromkeys(_NO_TOKEN_PROBES, "unknown text"), spelled: "that spelling in a text"}
        for probe, what in probes.items():
            if end in _ids_or_none(encoder, probe):
                raise UserError(
                    f"{encoder.label}: its end token {spelled!r} ({end}) is also what {what} becomes, so that"
                    f" documents would end anywhere: {remedy} to another token"
                )
    return end


def vocab_size(tokenizer: Any) -> int:
    """The largest id + 1."""
    return max(tokenizer.get_vocab().values()) + 1


def definition_sha256(tokenizer: Any, opened: TextBackend | None = None) -> str:
    """What two tokenizers must share to give the same ids for every text; `vocabulary_sha256` is less: equal
    words may be split by other rules."""
    if opened is not None:
        return opened.definition_sha256
    backend = backend_of(tokenizer)
    if backend is not None:
        return definition_of(backend)
    return content_hash([type(tokenizer).__name__, vocabulary_sha256(tokenizer)])


def _begin_ids(tokenizer: Any, label: str) -> tuple[int, ...]:
    """What the tokenizer puts before every text.

    Raises:
        UserError: it is not the same for all.
    """
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    found: set[tuple[int, ...]] | None = None
    for probe in (*_PROBES, *sorted(words, key=lambda word: (len(word), word))[:8]):
        try:
            bare = _ids_of(tokenizer, probe, add_special_tokens=False)
        except BaseException as error:
            library_fault(error)  # it has no token for the probe, nor an unknown one
            continue
        if not bare:
            continue
        try:
            whole = _ids_of(tokenizer, probe, add_special_tokens=True)
        except BaseException as error:
            raise UserError(
                f"{label} cannot put its own tokens around a text ({first_line(library_fault(error))}): its"
                " post_processor names tokens that it does not have; mend it, or save the tokenizer again"
            ) from error
        places = range(len(whole) - len(bare) + 1)
        befores = {tuple(whole[:at]) for at in places if whole[at : at + len(bare)] == bare}
        found = befores if found is None else found & befores
    if found is None:
        return ()
    if not found:
        raise UserError(
            f"{label} puts tokens around a text that depend on the text, so that documents cannot be written"
            " as the model reads prompts: set its post_processor to tokens that are the same for every text"
        )
    return min(found, key=len)


def _ids_of(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    ids = tokenizer(
        text, add_special_tokens=add_special_tokens, truncation=False, padding=False, verbose=False
    )["input_ids"]
    return list(ids)


def _ids_or_none(encoder: TextEncoder, text: str) -> Sequence[int]:
    try:
        return encoder._encode([text])[0][0]
    except BaseException as error:
        library_fault(error)  # it has no token for the text
        return []


def _name_of(names: Sequence[str] | None, number: int) -> str:
    return f"text {number + 1}" if names is None else names[number]


def _first_surrogate(text: str) -> str:
    at = next(at for at, character in enumerate(text) if "\ud800" <= character <= "\udfff")
    return f"U+{ord(text[at]):04X} at character {at}"
