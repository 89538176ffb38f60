"""Part of `prepare_corpus`: documents that nearly repeat others: found, counted, and left out if asked for.

The first reading signs every document (engines/minhash.py), in the process and rank that read it. All
signatures are then compared here, after the documents were dealt to the splits. Of documents that are alike
the first is kept, in the order test, heldout, tuning, train, and within a split by name: what repeats a
document that is reported on leaves the training, and not the other way round. Memory: a signature of
`--near-duplicate-hashes` bytes a document, twice that and about 60 bytes while they are compared.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.minhash import SignatureRules
from mlpmem_ds.formats.corpus import SPLITS, NearDuplicates
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.maths.similar_signatures import repeated_by, similar_pairs
from mlpmem_ds.stages.corpus.splits import NOT_TAKEN, SurveyedDocuments

_logger = logging.getLogger(__name__)
Mode = Literal["keep", "report", "remove"]
LIST_FILE = "near_duplicates.jsonl"
_KEPT_FIRST = ("test", "heldout", "tuning", "train")


@dataclass(frozen=True, kw_only=True)
class NearDuplicateRules:
    """What is a near duplicate (from which Jaccard similarity of its n-grams on), and what becomes of it."""

    mode: Mode
    threshold: float
    signatures: SignatureRules


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """A document that nearly repeats another, and the estimated similarity of the two."""

    number: int
    name: str
    split: str
    kept_name: str
    kept_split: str
    similarity: float
    num_bytes: int

    def to_line(self) -> str:
        values = {
            "name": self.name,
            "split": self.split,
            "repeats": self.kept_name,
            "repeats_split": self.kept_split,
            "similarity": round(self.similarity, 3),
        }
        return json.dumps(values, ensure_ascii=False) + "\n"


def find_repetitions(
    documents: SurveyedDocuments, split_of: array[int], rules: NearDuplicateRules
) -> list[Repetition]:
    """Those among the documents that are taken, in the order in which documents are kept."""
    names = documents.names
    assert names is not None, "near duplicates are told by their names"
    rank_of = {SPLITS.index(split): rank for rank, split in enumerate(_KEPT_FIRST)}
    order = sorted(
        (number for number, split in enumerate(split_of) if split != NOT_TAKEN),
        key=lambda number: (rank_of[split_of[number]], names[number]),
    )
    signatures_NP = np.frombuffer(documents.signatures, np.uint8).reshape(len(documents), -1)
    first_M, second_M, similarity_M = similar_pairs(signatures_NP[order], rules.threshold)
    return [
        Repetition(
            number=order[second],
            name=names[order[second]],
            split=SPLITS[split_of[order[second]]],
            kept_name=names[order[int(first_M[pair])]],
            kept_split=SPLITS[split_of[order[int(first_M[pair])]]],
            similarity=float(similarity_M[pair]),
            num_bytes=documents.sizes[order[second]],
        )
        for second, pair in repeated_by(first_M, second_M).items()
    ]


def leave_out(repetitions: Iterable[Repetition], split_of: array[int]) -> Iterator[Omission]:
    """Take the documents out of their splits; an omission for each."""
    for repetition in repetitions:
        split_of[repetition.number] = NOT_TAKEN
        yield Omission(name=repetition.name, reason="near duplicate", detail=repetition.kept_name)


def check_what_is_left(
    repetitions: Iterable[Repetition], split_of: array[int], rules: NearDuplicateRules
) -> None:
    """Warn of splits that have lost all their documents; call it after `leave_out`.

    Raises:
        UserError: the training split has.
    """
    num_lost = Counter(repetition.split for repetition in repetitions)
    emptied = {split: num_lost[split] for split in num_lost if SPLITS.index(split) not in split_of}
    remedy = (
        f"each is at least --near-duplicate-threshold {rules.threshold:g} like one of another split; give"
        " other text too, a higher threshold, or --near-duplicates report"
    )
    if "train" in emptied:
        raise UserError(
            f"--near-duplicates remove takes all documents of the training split ({emptied['train']}):"
            f" {remedy}"
        )
    for split, count in emptied.items():
        _logger.warning(
            "the %s split is empty, because --near-duplicates remove takes all its documents (%d): %s",
            split, count, remedy,
        )  # fmt: skip


def count_repetitions(repetitions: Iterable[Repetition], rules: NearDuplicateRules) -> NearDuplicates:
    """The manifest's record of them."""
    between: dict[str, dict[str, int]] = {}
    num_documents = num_bytes = 0
    for one in repetitions:
        counts = between.setdefault(one.split, {})
        counts[one.kept_split] = counts.get(one.kept_split, 0) + 1
        num_documents, num_bytes = num_documents + 1, num_bytes + one.num_bytes
    return NearDuplicates(
        are_removed=rules.mode == "remove",
        threshold=rules.threshold,
        words=rules.signatures.words,
        hashes=rules.signatures.hashes,
        num_documents=num_documents,
        num_bytes=num_bytes,
        between=between,
    )


def describe_near_duplicates(counts: NearDuplicates) -> str:
    """A line of the table at the end."""
    pairs = "; ".join(
        f"{number:,} of {split} repeat{'s one' if number == 1 else ' some'} of {kept_split}"
        for split, others in counts.between.items()
        for kept_split, number in others.items()
    )
    what = "removed" if counts.are_removed else "kept"
    return (
        f"repeated  {counts.num_documents:,} documents, {counts.num_bytes:,} bytes, are at least"
        f" {counts.threshold:g} like another: {what}{f' ({pairs})' if pairs else ''}"
    )
