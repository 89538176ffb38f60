"""Part of `prepare_corpus`: the second reading of the inputs, documents → token ids, batch by batch.

A text file is read by the process that tokenizes it. A file of many documents is read by the main process,
which sends their text with the batch.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.engines.tokenizer import EncodedDocument
from mlpmem_ds.formats.corpus import Counts, token_dtype
from mlpmem_ds.formats.documents import Document, SourceFile, read_documents
from mlpmem_ds.formats.records import ReadRules
from mlpmem_ds.stages.corpus.splits import NOT_TAKEN
from mlpmem_ds.stages.corpus.survey import Survey, SurveyedUnit
from mlpmem_ds.stages.corpus.workers import Workers

BATCH_BYTES = 1 << 18
"""text of a batch: small compared with a unit, so that no process idles at its end, and large compared with
the cost of sending it to another process"""


class DocumentEncoder(Protocol):
    """Documents → ids: of texts (engines/tokenizer.py) or of conversations (engines/chat_template.py)."""

    @property
    def label(self) -> str:
        """For messages."""

    @property
    def vocab_size(self) -> int:
        """The largest id + 1."""

    def encode_documents(
        self, texts: Sequence[str], names: Sequence[str] | None = None
    ) -> list[EncodedDocument]:
        """The ids of each document, from its begin tokens to its end token."""


class Item(NamedTuple):
    """A document that is to be tokenized; a SourceFile is a text file that is still to be read."""

    source: SourceFile | Document
    split: int
    digest: bytes
    """SHA-256 of the text that the survey found"""


_inherited: list[DocumentEncoder] = []  # in a worker process
_to_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes an encoder at each call


@dataclass(kw_only=True)
class TokenizedText:
    """Some documents of one split as they are written."""

    ids: bytearray = field(default_factory=bytearray)
    lines: list[str] = field(default_factory=list)
    """JSON, an entry a document"""
    tokens: int = 0
    num_bytes: int = 0
    unknown: int = 0
    """tokens that are the unknown token"""
    dropped: int = 0
    """characters that the tokenizer has no token for, and leaves out"""
    is_answer: bytearray = field(default_factory=bytearray)
    """a byte a token, where answers alone count"""
    answers: int = 0
    answer_bytes: int = 0


class TokenizerPool:
    """Tokenizes a survey's units with a number of processes; use it in a `with`."""

    def __init__(
        self,
        encoder: DocumentEncoder,
        rules: ReadRules,
        processes: int,
        *,
        counts: Counts = "all",
        strict: bool = False,
    ) -> None:
        _inherited[:] = [encoder]
        self._rules, self._workers = rules, Workers(processes)
        self._tokenize = functools.partial(_tokenize_batch, rules, counts, strict)

    def __enter__(self) -> TokenizerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.close()

    def tokenize(self, survey: Survey, unit: SurveyedUnit) -> Iterator[dict[int, TokenizedText]]:
        """The unit's documents that are taken, by split, a batch at a time.

        Raises:
            DamagedDataError: the files do not hold what the survey found in them.
        """
        return self._workers.map(self._tokenize, _batches(documents_of_unit(self._rules, survey, unit)))


def documents_of_unit(rules: ReadRules, survey: Survey, unit: SurveyedUnit) -> Iterator[Item]:
    """Each document that is taken, a text file unread.

    Raises:
        DamagedDataError: a file does not hold what the survey found in it.
    """
    number = unit.first
    for file, count in zip(unit.files, unit.counts, strict=True):
        splits = survey.split_of[number : number + count]
        if file.kind == "text" and rules.piece is None:
            yield from (Item(file, split, survey.digest(number)) for split in splits if split != NOT_TAKEN)
        elif splits.count(NOT_TAKEN) < count:
            yield from _documents_of_file(rules, survey, file, range(number, number + count))
        number += count


def _documents_of_file(rules: ReadRules, survey: Survey, file: SourceFile, numbers: range) -> Iterator[Item]:
    found = 0
    for document in _documents_in(file, rules):
        if found < len(numbers) and survey.split_of[numbers[found]] != NOT_TAKEN:
            yield Item(document, survey.split_of[numbers[found]], survey.digest(numbers[found]))
        found += 1
    if found != len(numbers):
        raise _changed(file.path, f"it holds {found} documents, not {len(numbers)}")


def _documents_in(file: SourceFile, rules: ReadRules) -> Iterator[Document]:
    """What the survey has left out is left out again."""
    return (document for document in read_documents(file, rules) if isinstance(document, Document))


def read_document(rules: ReadRules, item: Item) -> Document:
    """The document itself.

    Raises:
        DamagedDataError: it has not the text that the survey found.
    """
    document = item.source
    if isinstance(document, SourceFile):
        documents = list(_documents_in(document, rules))
        if len(documents) != 1:
            raise _changed(document.path, f"it holds {len(documents)} documents, not 1")
        (document,) = documents
    if hashlib.sha256(document.text.encode()).digest() != item.digest:
        raise _changed(document.name, "its text is another one than at first")
    return document


def _changed(name: str | Path, how: str) -> DamagedDataError:
    return DamagedDataError(
        f"the input changed while it was read ({name}: {how}): run again when the files no longer change,"
        " with another --output"
    )


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += item.source.num_bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenize_batch(
    rules: ReadRules, counts: Counts, strict: bool, batch: list[Item]
) -> dict[int, TokenizedText]:
    """Tokenized documents by split; runs in a worker or in the main process."""
    documents = [read_document(rules, item) for item in batch]
    (encoder,) = _inherited
    dtype = token_dtype(encoder.vocab_size)
    texts: dict[int, TokenizedText] = {}
    for document, encoded, item in zip(documents, encode(encoder, documents), batch, strict=True):
        if encoded.num_dropped and strict:
            raise UserError(
                f"--strict: {encoder.label} has no token for {encoded.num_dropped} characters of"
                f" {document.name} and would leave them out: give a tokenizer that has all, such as a"
                " byte-level one"
            )
        num_bytes = document.num_bytes if encoded.is_answer_n is None else encoded.num_bytes
        entry = {
            "name": document.name,
            "group": document.group,
            "bytes": num_bytes,
            "tokens": len(encoded.ids),
        }
        part = texts.setdefault(item.split, TokenizedText())
        if counts == "answers" and encoded.is_answer_n is not None:
            num_answers = int(np.count_nonzero(encoded.is_answer_n))
            entry |= {"answers": num_answers, "answer_bytes": encoded.num_answer_bytes}
            part.is_answer += encoded.is_answer_n.tobytes()
            part.answers += num_answers
            part.answer_bytes += encoded.num_answer_bytes
        part.ids += encoded.ids.astype(dtype).tobytes()
        part.lines.append(_to_json(entry) + "\n")
        part.tokens += len(encoded.ids)
        part.num_bytes += num_bytes
        part.unknown += encoded.num_unknown
        part.dropped += encoded.num_dropped
    return texts


def encode(encoder: DocumentEncoder, documents: Sequence[Document]) -> list[EncodedDocument]:
    """The ids of each document, from its begin tokens to its end token."""
    return encoder.encode_documents(
        [document.text for document in documents], [document.name for document in documents]
    )
