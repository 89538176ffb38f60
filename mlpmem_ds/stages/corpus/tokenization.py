"""Part of `prepare_corpus`: the second reading of the inputs, documents → token ids, batch by batch.

A text file is read by the process that tokenizes it. A file of many documents is read by the main process,
which sends their text with the batch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.formats.documents import Document, SourceFile, read_documents
from mlpmem_ds.formats.records import ReadRules
from mlpmem_ds.stages.corpus.splits import NOT_TAKEN
from mlpmem_ds.stages.corpus.survey import CorpusUnit, Survey
from mlpmem_ds.stages.corpus.workers import Workers

BATCH_BYTES = 1 << 17
"""text of a batch: small compared with a unit, so that no process idles at its end, and large compared with
the cost of sending it to another process"""
Batch = list[tuple[SourceFile | Document, int]]
"""what is to be tokenized, in order, each with its split; a SourceFile is a text file that is still to be
read"""
_inherited: list[Any] = []  # the tokenizer, in a worker process


@dataclass(kw_only=True)
class TokenizedText:
    """Some documents of one split as they are written."""

    ids: bytearray = field(default_factory=bytearray)
    lines: list[str] = field(default_factory=list)
    """JSON, an entry a document"""
    tokens: int = 0
    num_bytes: int = 0


def vocab_size(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def encode(tokenizer: Any, texts: Sequence[str], dtype: np.dtype[Any]) -> list[np.ndarray]:
    """Each text's ids and the end-of-document id after them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        lists = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    else:
        lists = [
            encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
    for ids in lists:
        ids.append(tokenizer.eos_token_id)
    return [np.fromiter(ids, dtype, len(ids)) for ids in lists]


class TokenizerPool:
    """Tokenizes a survey's units with a number of processes; use it in a `with`."""

    def __init__(self, tokenizer: Any, dtype: np.dtype[Any], rules: ReadRules, processes: int) -> None:
        _inherited[:] = [tokenizer]
        self._rules, self._workers = rules, Workers(processes)
        self._tokenize = functools.partial(_tokenize_batch, rules, dtype)

    def __enter__(self) -> TokenizerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.close()

    def tokenize(self, survey: Survey, unit: CorpusUnit) -> Iterator[dict[int, TokenizedText]]:
        """The unit's documents that are taken, by split, a batch at a time.

        Raises:
            DamagedDataError: the files do not hold what the survey found in them.
        """
        return self._workers.map(self._tokenize, _batches(documents_of_unit(self._rules, survey, unit)))


def documents_of_unit(
    rules: ReadRules, survey: Survey, unit: CorpusUnit
) -> Iterator[tuple[SourceFile | Document, int]]:
    """Each document that is taken, with its split; a text file as a SourceFile, unread.

    Raises:
        DamagedDataError: a file does not hold what the survey found in it.
    """
    number = unit.first
    for file, count in zip(unit.files, unit.counts, strict=True):
        splits = survey.split_of[number : number + count]
        number += count
        if file.kind == "text":
            yield from ((file, split) for split in splits if split != NOT_TAKEN)
        elif splits.count(NOT_TAKEN) < count:
            yield from _documents_of_file(rules, file, splits)


def _documents_of_file(
    rules: ReadRules, file: SourceFile, splits: Sequence[int]
) -> Iterator[tuple[Document, int]]:
    found = 0
    for document in _documents_in(file, rules):
        if found < len(splits) and splits[found] != NOT_TAKEN:
            yield document, splits[found]
        found += 1
    if found != len(splits):
        raise _changed(file, found, len(splits))


def _documents_in(file: SourceFile, rules: ReadRules) -> Iterator[Document]:
    """What the survey has left out is left out again."""
    return (document for document in read_documents(file, rules) if isinstance(document, Document))


def read_document(rules: ReadRules, item: SourceFile | Document) -> Document:
    """The document itself.

    Raises:
        DamagedDataError: the text file no longer holds exactly one.
    """
    if isinstance(item, Document):
        return item
    documents = list(_documents_in(item, rules))
    if len(documents) != 1:
        raise _changed(item, len(documents), 1)
    return documents[0]


def _changed(file: SourceFile, found: int, expected: int) -> DamagedDataError:
    return DamagedDataError(
        f"the input changed while it was read ({file.path} holds {found} documents, not {expected}): run"
        " again when the files no longer change, with another --output"
    )


def _batches(items: Iterator[tuple[SourceFile | Document, int]]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for item, split in items:
        batch.append((item, split))
        size += item.num_bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenize_batch(rules: ReadRules, dtype: np.dtype[Any], batch: Batch) -> dict[int, TokenizedText]:
    """Tokenized documents by split; runs in a worker or in the main process."""
    documents = [read_document(rules, item) for item, _ in batch]
    arrays = encode(_inherited[0], [document.text for document in documents], dtype)
    texts: dict[int, TokenizedText] = {}
    for document, ids, (_, split) in zip(documents, arrays, batch, strict=True):
        entry = {
            "name": document.name,
            "group": document.group,
            "bytes": document.num_bytes,
            "tokens": len(ids),
        }
        part = texts.setdefault(split, TokenizedText())
        part.ids += ids.tobytes()
        part.lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        part.tokens += len(ids)
        part.num_bytes += document.num_bytes
    return texts
