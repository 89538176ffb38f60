"""Part of `prepare_corpus`: the first reading of the inputs names the units and deals documents to splits.

A worker process reads some files and writes what it found to a file of its own, about 150 bytes a document.
The main process reads these in the order of the inputs. Neither holds a text, or the findings of all files,
at once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.minhash import SignatureRules, signer
from mlpmem_ds.formats.documents import SourceFile, read_documents
from mlpmem_ds.formats.omissions import MergedOmissions, Omission, describe_omissions
from mlpmem_ds.formats.records import ReadRules
from mlpmem_ds.stages.corpus.near_duplicates import (
    NearDuplicateRules,
    Repetition,
    check_what_is_left,
    find_repetitions,
    leave_out,
)
from mlpmem_ds.stages.corpus.shared_survey import chunks_of, groups_of, shared_findings
from mlpmem_ds.stages.corpus.splits import (
    DIGEST_BYTES,
    NOT_TAKEN,
    SplitRules,
    SurveyedDocuments,
    check_splits,
    deal_documents,
)
from mlpmem_ds.stages.corpus.workers import Workers

_GROUP_BYTES = 4 << 20  # of the files that a process takes at once
_PART_DOCUMENTS = 4096
_to_json_text = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes an encoder at each call


@dataclass(frozen=True, kw_only=True)
class SurveyedUnit:
    """Some of the input files, how many documents each holds, and the number of the first of them."""

    files: tuple[SourceFile, ...]
    counts: tuple[int, ...]
    first: int
    input_number: int = 0
    """of the blend, where there is one; a unit is then of one input"""

    @property
    def stop(self) -> int:
        """One past the number of the last document."""
        return self.first + sum(self.counts)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the inputs hold: units, and each document's split as an index into SPLITS (or NOT_TAKEN)."""

    units: list[SurveyedUnit]
    split_of: array[int] = field(repr=False)
    num_bytes: int
    """of all documents, taken or not"""
    sha256: str
    """of the documents' names and texts"""
    groups_sha256: str | None
    """of their groups, where a field names them; else names say the groups too"""
    digests: bytearray = field(repr=False)
    """SHA-256 of each document's text, 32 bytes each: the second reading must find the same"""
    omissions: list[Omission] = field(repr=False)
    """what was left out, in the order of the files"""
    available: list[tuple[int, int]] = field(default_factory=list)
    """documents and bytes of each input, taken or not, where inputs have weights"""
    repetitions: list[Repetition] = field(default_factory=list, repr=False)

    def digest(self, number: int) -> bytes:
        """SHA-256 of the text of document `number`."""
        return bytes(self.digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES])

    @property
    def num_taken(self) -> int:
        return len(self.split_of) - self.split_of.count(NOT_TAKEN)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Some documents of a few files, without their texts."""

    sizes: array[int]
    groups: list[str]
    names: list[str]
    digests: bytes
    signatures: bytes
    """where near duplicates are looked for, as many bytes a document as the rules say"""
    listed: bytes
    """their entries in the list that `_ListHash` hashes"""
    ends: list[int]
    """for each file that ends in this part, the number of the part's documents up to there"""
    omissions: list[Omission]
    """of the files that end in this part"""


class _ListHash:
    """`content_hash` of a list, which is never whole in memory: of groups, or of [name, SHA-256]."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256(b"[")
        self._is_empty = True

    @staticmethod
    def pair(name: str, sha256: str) -> str:
        return f'\n [\n  {_to_json_text(name)},\n  "{sha256}"\n ]'

    @staticmethod
    def group(name: str) -> str:
        return f"\n {_to_json_text(name)}"

    def extend(self, entries: bytes) -> None:
        """Entries with commas between them."""
        if entries:
            self._digest.update(entries if self._is_empty else b"," + entries)
            self._is_empty = False

    def hexdigest(self) -> str:
        self._digest.update(b"]\n" if self._is_empty else b"\n]\n")
        return self._digest.hexdigest()


def survey_files(
    files: list[SourceFile],
    read_rules: ReadRules,
    rules: SplitRules,
    *,
    unit_bytes: int,
    processes: int = 1,
    shared: Path | None = None,
    world: World | None = None,
    left_out: Sequence[Omission] = (),
    input_stops: Sequence[int] = (),
    near: NearDuplicateRules | None = None,
) -> Survey:
    """Read the inputs once: hash every document, sample whole groups, deal documents to splits.

    Args:
        files: in the order of the corpus.
        read_rules: how they become documents.
        rules: what is taken, and the shares.
        unit_bytes: a unit is closed by the file in which it reaches this size.
        processes: that read; they do not change the result.
        shared: the stage's output, where several ranks share what they found; None: this rank reads all.
        world: this rank, where they do.
        left_out: when the files were found.
        input_stops: with weights, how many files are of each input and those before it.
        near: how near duplicates are found; None: they are not.

    Raises:
        UserError: two files of one name, no text, or nothing for the training split, be it only once near
            duplicates are removed.
    """
    _refuse_equal_names(files)
    needs_names = rules.max_bytes is not None or bool(rules.weights) or near is not None
    documents, listed = SurveyedDocuments(with_names=needs_names), _ListHash()
    units = _UnitList(unit_bytes, input_stops if rules.weights else ())
    omissions, rest = list(left_out), iter(files)
    stop_of_file = size = 0  # of the file before; of the file so far
    reading = Reading(rules=read_rules, signatures=None if near is None else near.signatures)
    for part in _read_shared(files, reading, processes, shared, world or World()):
        first, start = len(documents), 0
        documents.extend(part.sizes, part.groups, part.digests, part.names, part.signatures)
        listed.extend(part.listed)
        omissions += part.omissions
        for end in part.ends:
            units.add(next(rest), first + end - stop_of_file, size + sum(part.sizes[start:end]))
            start, stop_of_file, size = end, first + end, 0
        size += sum(part.sizes[start:])
    units.close()
    documents.inputs = units.inputs
    if not documents and omissions:
        raise UserError(f"the inputs hold no text; left out: {'; '.join(describe_omissions(omissions))}")
    split_of = deal_documents(documents, rules)
    check_splits(split_of, rules)
    if num_beyond := split_of.count(NOT_TAKEN):
        omissions.append(Omission(name="", reason="not sampled", count=num_beyond))
    repetitions = [] if near is None else find_repetitions(documents, split_of, near)
    if near is not None and near.mode == "remove":
        omissions += leave_out(repetitions, split_of)
        check_what_is_left(repetitions, split_of, near)
    return Survey(
        units=units.units,
        split_of=split_of,
        num_bytes=sum(documents.sizes),
        sha256=listed.hexdigest(),
        groups_sha256=None if read_rules.group_field is None else _groups_sha256(documents),
        digests=documents.digests,
        omissions=omissions,
        available=[(part.size, sum(documents.sizes[slice(*part)])) for part in documents.inputs],
        repetitions=repetitions,
    )


def _groups_sha256(documents: SurveyedDocuments) -> str:
    """`content_hash` of the documents' groups, in their order."""
    entries, listed = [_ListHash.group(name) for name in documents.groups], _ListHash()
    for start in range(0, len(documents), _PART_DOCUMENTS):
        groups = documents.group_of[start : start + _PART_DOCUMENTS]
        listed.extend(",".join(entries[group] for group in groups).encode())
    return listed.hexdigest()


class _UnitList:
    """Files, one after another, as units: one ends with the file in which it reaches its size, and with the
    last file of an input of a blend."""

    def __init__(self, unit_bytes: int, input_stops: Sequence[int]) -> None:
        self.units: list[SurveyedUnit] = []
        self.inputs: list[Block] = []
        """the documents of each input of a blend"""
        self._unit_bytes, self._input_stops = unit_bytes, input_stops
        self._counts: dict[SourceFile, int] = {}
        self._size = self._num_files = self._num_documents = 0

    def add(self, file: SourceFile, num_documents: int, num_bytes: int) -> None:
        self._close_inputs()
        self._counts[file] = num_documents
        self._size += num_bytes
        self._num_files += 1
        self._num_documents += num_documents
        if self._size >= self._unit_bytes:
            self._close_unit()

    def close(self) -> None:
        """There are no more files."""
        self._close_inputs()
        self._close_unit()

    def _close_inputs(self) -> None:
        while (
            len(self.inputs) < len(self._input_stops)
            and self._input_stops[len(self.inputs)] == self._num_files
        ):
            self._close_unit()
            first = self.inputs[-1].stop if self.inputs else 0
            self.inputs.append(Block(first, self._num_documents))

    def _close_unit(self) -> None:
        if self._counts:
            counts = tuple(self._counts.values())
            self.units.append(
                SurveyedUnit(
                    files=tuple(self._counts),
                    counts=counts,
                    first=self._num_documents - sum(counts),
                    input_number=len(self.inputs),
                )
            )
        self._counts, self._size = {}, 0


def _refuse_equal_names(files: Sequence[SourceFile]) -> None:
    if len({file.name for file in files}) == len(files):
        return
    first: dict[str, SourceFile] = {}
    for file in files:
        other = first.setdefault(file.name, file)
        if other is not file:
            raise UserError(
                f"two inputs hold documents of the same name {file.name!r} ({other.path} and {file.path}):"
                " rename one of the files or of their folders"
            )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files become documents, and how these are signed; None: they are not."""

    rules: ReadRules
    signatures: SignatureRules | None = None


def _read_shared(
    files: list[SourceFile], reading: Reading, processes: int, shared: Path | None, world: World
) -> Iterator[_Part]:
    """`_read_parts`, each file by one of the ranks if they share what they find."""
    if shared is None:
        yield from _read_parts(files, reading, processes)
        return

    def find(chunk: tuple[SourceFile, ...]) -> dict[str, Any]:
        return {"parts": [_to_json(part) for part in _read_parts(list(chunk), reading, processes)]}

    chunks, settings = chunks_of(files, world.size), dataclasses.asdict(reading)
    for found in shared_findings(chunks, find, settings=settings, folder=shared, world=world):
        yield from map(_from_json, found["parts"])


def _to_json(part: _Part) -> dict[str, str]:
    """Few and long texts, which JSON reads and writes in a hundredth of the time of many short ones."""
    omissions = [omission.to_json() for omission in part.omissions]
    lists = json.dumps([part.sizes.tolist(), part.groups, part.names, part.ends, omissions])
    return {
        "lists": lists,
        "digests": part.digests.hex(),
        "signatures": part.signatures.hex(),
        "listed": part.listed.decode(),
    }


def _from_json(value: Mapping[str, str]) -> _Part:
    sizes, groups, names, ends, omissions = json.loads(value["lists"])
    return _Part(
        sizes=array("q", sizes),
        groups=groups,
        names=names,
        digests=bytes.fromhex(value["digests"]),
        signatures=bytes.fromhex(value["signatures"]),
        listed=value["listed"].encode(),
        ends=ends,
        omissions=[Omission.from_json(values) for values in omissions],
    )


def _read_parts(files: list[SourceFile], reading: Reading, processes: int) -> Iterator[_Part]:
    """Sizes, groups, names and hashes of the documents, in their order."""
    if processes == 1:
        yield from _parts(files, reading)
        return
    with tempfile.TemporaryDirectory() as scratch, Workers(processes) as workers:
        tasks = enumerate(groups_of(files, _GROUP_BYTES))
        for path in workers.map(functools.partial(_write_parts, reading, Path(scratch)), tasks):
            with open(path, "rb") as stream:
                while (part := pickle.load(stream)) is not None:  # written by _write_parts a moment ago
                    yield part
            path.unlink()


def _write_parts(reading: Reading, scratch: Path, task: tuple[int, tuple[SourceFile, ...]]) -> Path:
    """Run in a worker: write the parts of some files to one file, and return its path."""
    number, files = task
    with open(scratch / f"{number}", "wb") as stream:
        for part in _parts(files, reading):
            pickle.dump(part, stream)
        pickle.dump(None, stream)
    return scratch / f"{number}"


def _parts(files: Iterable[SourceFile], reading: Reading) -> Iterator[_Part]:
    """Sizes, groups, names and hashes of the files' documents; only one text is in memory."""
    sign = None if reading.signatures is None else signer(reading.signatures)
    signatures = bytearray()
    entries: list[tuple[str, str, int, str]] = []  # name, group, bytes, SHA-256
    ends: list[int] = []
    omissions: list[Omission] = []
    for file in files:
        merged = MergedOmissions()
        for document in read_documents(file, reading.rules):
            if isinstance(document, Omission):
                merged.add(document)
                continue
            entries.append((document.name, document.group, document.num_bytes, document.sha256))
            if sign is not None:
                signatures += sign(document.text)
            if len(entries) == _PART_DOCUMENTS:
                yield _part(entries, ends, omissions, bytes(signatures))
                entries, ends, omissions = [], [], []
                signatures.clear()
        ends.append(len(entries))
        omissions += merged.all()
    yield _part(entries, ends, omissions, bytes(signatures))


def _part(
    entries: list[tuple[str, str, int, str]], ends: list[int], omissions: list[Omission], signatures: bytes
) -> _Part:
    return _Part(
        sizes=array("q", (size for _, _, size, _ in entries)),
        groups=[group for _, group, _, _ in entries],
        names=[name for name, *_ in entries],
        digests=bytes.fromhex("".join(sha256 for *_, sha256 in entries)),
        signatures=signatures,
        listed=",".join(_ListHash.pair(name, sha256) for name, _, _, sha256 in entries).encode(),
        ends=ends,
        omissions=omissions,
    )
