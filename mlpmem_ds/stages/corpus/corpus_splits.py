"""Of the first stage: one reading of the inputs that names the units and deals every document to a split.

What is kept of a document is its size, group and hash (about 50 bytes), never its text. Two texts that are equal to the
letter get the same hash and so the same split: nothing of the test text is trained on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.hashing import hash_fraction
from mlpmem_ds.formats.corpus import SPLITS
from mlpmem_ds.formats.documents import Document, SourceFile, read_documents

_logger = logging.getLogger(__name__)
_DIGEST_BYTES = 32
UNWANTED = -1


@dataclass(frozen=True, kw_only=True)
class SplitRules:
    """Which documents are taken, and the share of each split; bytes and fractions of bytes."""

    tuning_fraction: float
    test_fraction: float
    heldout_fraction: float
    max_bytes: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class DocumentReader:
    """How files become documents."""

    text_field: str
    group_field: str | None

    def read(self, files: Iterable[SourceFile]) -> Iterator[Document]:
        for file in files:
            yield from read_documents(file, text_field=self.text_field, group_field=self.group_field)


@dataclass(frozen=True, kw_only=True)
class CorpusUnit:
    """Some of the input files, and the numbers [first, stop) of their documents."""

    files: tuple[SourceFile, ...]
    first: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the inputs hold: units, and each document's split as an index into SPLITS (or UNWANTED)."""

    units: list[CorpusUnit]
    split_of: array[int] = field(repr=False)
    num_bytes: int
    """of all documents, wanted or not"""
    sha256: str

    @property
    def num_wanted(self) -> int:
        return len(self.split_of) - self.split_of.count(UNWANTED)


class _Documents:
    """What is kept of the documents while they are dealt, by number."""

    def __init__(self, *, with_names: bool) -> None:
        self.sizes = array("q")
        self.group_of = array("q")
        self.groups: dict[str, int] = {}
        self.digests = bytearray()
        self.names: list[str] | None = [] if with_names else None

    def __len__(self) -> int:
        return len(self.sizes)

    def add(self, document: Document) -> None:
        self.sizes.append(document.num_bytes)
        self.group_of.append(self.groups.setdefault(document.group, len(self.groups)))
        self.digests += bytes.fromhex(document.sha256)
        if self.names is not None:
            self.names.append(document.name)

    def digest(self, number: int) -> str:
        return self.digests[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES].hex()


class _ListHash:
    """`content_hash` of a list of [name, SHA-256], which is never whole in memory."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256(b"[")
        self._is_empty = True

    def add(self, name: str, sha256: str) -> None:
        spelled = json.dumps(name, ensure_ascii=False)
        separator = "" if self._is_empty else ","
        self._digest.update(f'{separator}\n [\n  {spelled},\n  "{sha256}"\n ]'.encode())
        self._is_empty = False

    def hexdigest(self) -> str:
        self._digest.update(b"]\n" if self._is_empty else b"\n]\n")
        return self._digest.hexdigest()


def survey_files(files: list[SourceFile], reader: DocumentReader, rules: SplitRules, *, unit_bytes: int) -> Survey:
    """Read the inputs once: hash every document, sample whole groups, deal documents to splits.

    Args:
        files: in the order of the corpus.
        reader: how they become documents.
        rules: what is taken, and the shares.
        unit_bytes: a unit is closed by the file in which it reaches this size.

    Raises:
        UserError: two files of one name, or nothing for the training split.
    """
    if len({file.name for file in files}) != len(files):
        raise UserError("two inputs hold documents of the same name: give their common parent directory as one --input")
    documents, listed = _Documents(with_names=bool(rules.max_bytes)), _ListHash()
    units: list[CorpusUnit] = []
    of_unit: list[SourceFile] = []
    first = size = 0
    for file in files:
        of_unit.append(file)
        for document in reader.read([file]):
            documents.add(document)
            listed.add(document.name, document.sha256)
            size += document.num_bytes
        if size >= unit_bytes:
            units.append(CorpusUnit(files=tuple(of_unit), first=first, stop=len(documents)))
            of_unit, first, size = [], len(documents), 0
    if of_unit:
        units.append(CorpusUnit(files=tuple(of_unit), first=first, stop=len(documents)))
    split_of = _deal(documents, rules)
    _check_splits(split_of, rules)
    return Survey(units=units, split_of=split_of, num_bytes=sum(documents.sizes), sha256=listed.hexdigest())


def _check_splits(split_of: array[int], rules: SplitRules) -> None:
    fractions = {"tuning": rules.tuning_fraction, "test": rules.test_fraction, "heldout": rules.heldout_fraction}
    for split, fraction in fractions.items():
        if fraction and SPLITS.index(split) not in split_of:
            _logger.warning("the %s split is empty: every document is larger than its share of the text", split)
    if SPLITS.index("train") not in split_of:
        raise UserError(
            f"the inputs hold {len(split_of)} documents with text, {len(split_of) - split_of.count(UNWANTED)} of them "
            "wanted, and none fell in the training split: give more text or smaller fractions"
        )


def _deal(documents: _Documents, rules: SplitRules) -> array[int]:
    """Each document's split. Held-out groups first, then tuning and test documents, each in the order of a hash.

    What would overfill a split's share of the bytes is passed over, so that one long document does not decide its size.
    """
    wanted = _sample(documents, rules)
    total = sum(documents.sizes[number] for number in wanted)
    names = list(documents.groups)
    heldout_groups: set[str] = set()
    if rules.heldout_fraction:
        by_group: dict[str, int] = {}
        for number in wanted:
            group = names[documents.group_of[number]]
            by_group[group] = by_group.get(group, 0) + documents.sizes[number]
        heldout_groups = _fill(by_group, rules.heldout_fraction * total, f"group:{rules.seed}")
    heldout = {documents.groups[name] for name in heldout_groups}
    tuning: set[str] = set()
    test: set[str] = set()
    if rules.tuning_fraction or rules.test_fraction:
        by_text: dict[str, int] = {}
        for number in wanted:
            if documents.group_of[number] not in heldout:
                digest = documents.digest(number)
                by_text[digest] = by_text.get(digest, 0) + documents.sizes[number]
        tuning = _fill(by_text, rules.tuning_fraction * total, f"tuning:{rules.seed}")
        rest = {text: size for text, size in by_text.items() if text not in tuning}
        test = _fill(rest, rules.test_fraction * total, f"test:{rules.seed}")
    in_heldout = {documents.digest(number) for number in wanted if documents.group_of[number] in heldout}
    split_of = array("b", [UNWANTED]) * len(documents)
    for number in wanted:
        digest = documents.digest(number) if in_heldout or tuning or test else ""
        if documents.group_of[number] in heldout or digest in in_heldout:
            split = "heldout"
        else:
            split = "tuning" if digest in tuning else "test" if digest in test else "train"
        split_of[number] = SPLITS.index(split)
    return split_of


def _sample(documents: _Documents, rules: SplitRules) -> Iterable[int]:
    """Documents in hash order of their groups, as long as they fit in `max_bytes`; what does not fit is passed over."""
    if not rules.max_bytes or documents.names is None:
        return range(len(documents))
    groups = list(documents.groups)
    rank = {number: hash_fraction(f"sample:{group}", rules.seed) for number, group in enumerate(groups)}
    names, group_of = documents.names, documents.group_of

    def order(number: int) -> tuple[float, str, str]:
        return rank[group_of[number]], groups[group_of[number]], names[number]

    taken, total = [], 0
    for number in sorted(range(len(documents)), key=order):
        if total + documents.sizes[number] <= rules.max_bytes:
            taken.append(number)
            total += documents.sizes[number]
    return taken


def _fill(sizes: Mapping[str, int], quota: float, salt: str) -> set[str]:
    """Keys in the order of a hash, as long as they fit in the quota of bytes."""
    taken: set[str] = set()
    if quota <= 0:
        return taken
    total = 0
    for key in sorted(sizes, key=lambda key: (hash_fraction(f"{salt}:{key}"), key)):
        if total + sizes[key] <= quota:
            taken.add(key)
            total += sizes[key]
    return taken
