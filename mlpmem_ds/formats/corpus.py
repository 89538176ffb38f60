"""Read a corpus directory: token shards of several splits, seen as one stream of positions each. See
README.md.

N = positions of a split (num_tokens - 1).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from mlpmem_ds.core.blocks import WindowSequence, split_windows
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import content_hash
from mlpmem_ds.core.manifest import CompleteStage, Manifest, read_stage

SPLITS = ("train", "tuning", "test", "heldout")
SpecialTokens = Literal["text", "parse"]
"""what a special token is that is spelled in a text: ordinary text, or the special token itself"""
Counts = Literal["all", "answers"]
"""the tokens of a corpus that are learnt, stored and scored"""
_TOKENS_AT_ONCE = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def vocabulary_sha256(tokenizer: Any) -> str:
    """What two tokenizers (objects with `get_vocab`) must share to be exchangeable: every token and its
    id."""
    return content_hash(sorted(tokenizer.get_vocab().items()))


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What later stages need to know of the tokenizer.

    `vocab_size` is the largest id + 1. A document is begin ids, text, end id. Two tokenizers with the same
    `vocabulary_sha256` have the same tokens; with the same `definition_sha256` ("" where unknown) they
    give the same ids for every text.
    """

    vocabulary_sha256: str
    vocab_size: int
    end_of_document_id: int
    begin_of_document_ids: tuple[int, ...] = ()
    special_tokens: SpecialTokens = "text"
    definition_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class CorpusUnit:
    """What a unit adds to a split; `bytes` of UTF-8 text.

    `unknown`: tokens that are the unknown token; `dropped`: characters that the tokenizer has no token for;
    `answers`: tokens that are answers, and `answer_bytes` of UTF-8 text of these, where they alone count.
    """

    unit: str
    tokens: int
    documents: int
    bytes: int
    unknown: int = 0
    dropped: int = 0
    answers: int = 0
    answer_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """A split's units, in the order of its stream, and their totals; `num_bytes` of UTF-8 text."""

    num_tokens: int
    num_documents: int
    num_bytes: int
    units: tuple[CorpusUnit, ...]
    num_unknown: int = 0
    num_dropped: int = 0
    num_answers: int = 0
    num_answer_bytes: int = 0

    @classmethod
    def from_units(cls, units: Sequence[CorpusUnit]) -> SplitManifest:
        return cls(
            num_tokens=sum(unit.tokens for unit in units),
            num_documents=sum(unit.documents for unit in units),
            num_bytes=sum(unit.bytes for unit in units),
            units=tuple(units),
            num_unknown=sum(unit.unknown for unit in units),
            num_dropped=sum(unit.dropped for unit in units),
            num_answers=sum(unit.answers for unit in units),
            num_answer_bytes=sum(unit.answer_bytes for unit in units),
        )


@dataclass(frozen=True, kw_only=True)
class SourceCounts:
    """What was read of one kind of files: files, and documents with text, in a split or not."""

    files: int
    documents: int


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """What of one input is in a split; bytes of UTF-8 text."""

    num_documents: int
    num_bytes: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class BlendedInput:
    """An input of a blend: the share of the bytes that was asked for (`weight`), what it holds, and what of
    it is in which split."""

    input: str
    weight: float
    available_documents: int
    available_bytes: int
    splits: Mapping[str, SplitCounts]

    @property
    def num_documents(self) -> int:
        return sum(counts.num_documents for counts in self.splits.values())

    @property
    def num_bytes(self) -> int:
        return sum(counts.num_bytes for counts in self.splits.values())

    @property
    def num_tokens(self) -> int:
        return sum(counts.num_tokens for counts in self.splits.values())


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """Documents of which the n-grams of `words` words are like those of another, to the Jaccard similarity
    `threshold` or more, as `hashes` minimum hashes estimate it; `between`: split of such a document → split
    of the one that it repeats → how many."""

    are_removed: bool
    threshold: float
    words: int
    hashes: int
    num_documents: int
    num_bytes: int
    between: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class CorpusManifest(Manifest):
    """A corpus: `block_size` and `stride`, in tokens, are the windows that the base reads.

    `sources`: kind of files → what was read; `left_out`: reason (omissions.py) → how many things were not;
    `blend`: the inputs, where they have weights; `near_duplicates`: None where none were looked for;
    `counts`: the tokens that are learnt, stored and scored: all, or answers of conversations alone.
    """

    FORMAT: ClassVar[str] = "corpus"
    VERSION: ClassVar[int] = 1

    tokenizer: TokenizerFacts
    token_dtype: str
    block_size: int
    stride: int
    splits: Mapping[str, SplitManifest]
    sources: Mapping[str, SourceCounts] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    blend: tuple[BlendedInput, ...] = ()
    near_duplicates: NearDuplicates | None = None
    counts: Counts = "all"

    def num_counted(self, split: str) -> int:
        """Positions of a split whose values count: all, or those of answers; 0 where it has no such split."""
        if split not in self.splits:
            return 0
        found = self.splits[split]
        return found.num_answers if self.counts == "answers" else max(0, found.num_tokens - 1)


@dataclass(frozen=True, kw_only=True)
class CorpusSplit(CompleteStage[CorpusManifest]):
    """One split of a corpus as a stream; tokens stay on disk until asked for."""

    name: str

    @property
    def _split(self) -> SplitManifest:
        return self.manifest.splits[self.name]

    @property
    def num_tokens(self) -> int:
        return self._split.num_tokens

    @property
    def num_positions(self) -> int:
        return self.num_tokens - 1

    @property
    def num_counted(self) -> int:
        """Positions whose values count: all, or those of answers."""
        return self.manifest.num_counted(self.name)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the split's text, as far as it counts."""
        return self._split.num_answer_bytes if self.has_answers else self._split.num_bytes

    @property
    def vocab_size(self) -> int:
        return self.manifest.tokenizer.vocab_size

    @property
    def vocabulary_sha256(self) -> str:
        return self.manifest.tokenizer.vocabulary_sha256

    @property
    def end_of_document_id(self) -> int:
        return self.manifest.tokenizer.end_of_document_id

    @property
    def begin_of_document_ids(self) -> tuple[int, ...]:
        """The tokens that every document begins with, and every window is read with; often none."""
        return self.manifest.tokenizer.begin_of_document_ids

    @property
    def block_size(self) -> int:
        return self.manifest.block_size

    @property
    def stride(self) -> int:
        return self.manifest.stride

    @property
    def tokenizer_path(self) -> Path:
        return self.root / "tokenizer"

    @property
    def units(self) -> tuple[CorpusUnit, ...]:
        """What each unit adds to the split, in the order of the stream."""
        return self._split.units

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.manifest.token_dtype)

    @cached_property
    def token_files(self) -> list[str]:
        """Names of the files of its tokens, in the order of the stream."""
        return [f"{self.name}/tokens-{unit.unit}.bin" for unit in self._split.units if unit.tokens]

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """int64 [files + 1]: the first token of each of `token_files`, and one past the last."""
        return np.cumsum([0, *(unit.tokens for unit in self._split.units if unit.tokens)], dtype=np.int64)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64. Read, not memory-mapped: mapped pages would count as memory of this
        process."""
        return self._read(self.token_files, self.dtype, start, stop).astype(np.int64)

    def _read(self, names: Sequence[str], dtype: np.dtype[Any], start: int, stop: int) -> np.ndarray:
        """What these files hold of the tokens [start, stop), one number a token."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens [{start}, {stop}) are not in a stream of {self.num_tokens}")
        tokens = np.empty(stop - start, dtype=dtype)
        shard, at = int(np.searchsorted(self.shard_starts, start, side="right")) - 1, start
        while at < stop:
            first, last = (int(edge) for edge in self.shard_starts[shard : shard + 2])
            count = min(stop, last) - at
            path = self.path_of(names[shard])
            part = np.fromfile(path, dtype, count, offset=(at - first) * dtype.itemsize)
            if len(part) != count:
                raise DamagedDataError(f"{path} is shorter than its manifest says: prepare the corpus again")
            tokens[at - start : at - start + count] = part
            at, shard = at + count, shard + 1
        return tokens

    @property
    def has_answers(self) -> bool:
        """Whether answers alone count, as `is_answer` says."""
        return self.manifest.counts == "answers"

    @cached_property
    def answer_files(self) -> list[str]:
        """As `token_files`, of what says which tokens are answers; none where all count."""
        files = [f"{self.name}/answers-{unit.unit}.bin" for unit in self._split.units if unit.tokens]
        return files if self.has_answers else []

    @property
    def stream_files(self) -> list[str]:
        """All files that its stream is read from."""
        return [*self.token_files, *self.answer_files]

    def is_answer(self, start: int, stop: int) -> np.ndarray:
        """bool: whether the tokens [start, stop) count: all, or those that are answers."""
        if not self.has_answers:
            return np.ones(stop - start, dtype=bool)
        return self._read(self.answer_files, np.dtype(bool), start, stop)

    def counted(self, start: int, stop: int) -> np.ndarray:
        """bool: whether the values of positions [start, stop) count."""
        return self.is_answer(start + 1, stop + 1)

    def values(self, start: int, stop: int) -> np.ndarray:
        """The values of positions [start, stop) as int64: the tokens that follow."""
        return self.tokens(start + 1, stop + 1)

    def largest_token(self) -> int:
        """The largest id in the split. Reads all of it."""
        stops = self.shard_starts[1:].tolist()
        largest = 0
        for start, stop in zip(self.shard_starts[:-1].tolist(), stops, strict=True):
            for first in range(start, stop, _TOKENS_AT_ONCE):
                largest = max(largest, int(self.tokens(first, min(first + _TOKENS_AT_ONCE, stop)).max()))
        return largest

    @property
    def read_length(self) -> int:
        """The most tokens that a model reads at once: a block, and the begin tokens before it."""
        return self.block_size + len(self.begin_of_document_ids)

    def windows(self) -> WindowSequence:
        """What the base reads, in order: token windows and the positions that each predicts; computed, not
        listed."""
        return split_windows(self.num_positions, self.block_size, self.stride)

    @cached_property
    def documents(self) -> list[dict[str, Any]]:
        """`name`, `group`, `bytes`, `tokens` of each document in stream order; of conversations also
        `answers`, `answer_bytes`. About 500 bytes of memory each: not for the train split."""
        return list(self._read_documents())

    def numbers_of_documents(self, name: str) -> np.ndarray:
        """int64 [documents]: one of those numbers of each, and nothing else of them in memory."""
        return np.fromiter((document[name] for document in self._read_documents()), np.int64)

    def _read_documents(self) -> Iterator[dict[str, Any]]:
        if "documents" in self.__dict__:  # read already
            yield from self.documents
            return
        for unit in self._split.units:
            if unit.documents:
                name = f"{self.name}/documents-{unit.unit}.jsonl"
                self.check_files([name])
                # Names may hold U+2028 and the like, at which str.splitlines breaks.
                with open(self.root / name, encoding="utf-8", newline="\n") as stream:
                    yield from map(json.loads, stream)

    @cached_property
    def document_stops(self) -> np.ndarray:
        """int64 [documents]: one past each document's last token (its end-of-document token)."""
        return np.cumsum(self.numbers_of_documents("tokens"))

    def documents_of(self, positions_N: np.ndarray) -> np.ndarray:
        """int64 [N]: the number of the document that each position's value belongs to."""
        return np.searchsorted(self.document_stops, np.asarray(positions_N) + 1, side="right")

    def document_bounds(self, positions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first, stop), both int64 [N]: positions [first, stop) have values of the same document as each of
        these."""
        documents_N, stops = self.documents_of(positions_N), self.document_stops
        # The value of a position is the token after it.
        first_N = np.where(documents_N > 0, stops[np.maximum(documents_N - 1, 0)] - 1, 0)
        return np.maximum(first_N, 0), stops[documents_N] - 1


def open_corpus(root: Path, split: str = "train", *, flag: str = "--corpus") -> CorpusSplit:
    """Open one split of a complete corpus.

    Raises:
        UserError: no corpus there, or the split is empty or unknown.
        DamagedDataError: files missing, of another size or version.
    """
    corpus = read_stage(CorpusSplit, CorpusManifest, root, flag=flag, name=split)
    splits = corpus.manifest.splits
    if split not in splits or splits[split].num_tokens < 2:
        texts = {name: entry.num_tokens for name, entry in splits.items() if entry.num_tokens >= 2}
        present = ", ".join(f"{name} ({count:,} tokens)" for name, count in texts.items())
        raise UserError(
            f"{flag} {root} has no text in split {split!r}; it has {present or 'none'}: choose another "
            "split, or prepare the corpus with fractions for it"
        )
    if corpus.has_answers and not corpus.num_counted:
        raise UserError(
            f"{flag} {root} counts answers alone, and its split {split!r} has none: prepare it with more"
            " conversations, or with --train-on all"
        )
    corpus.check_files(record.name for record in corpus.files.starting_with("tokenizer/"))
    if sum(unit.tokens for unit in splits[split].units) != corpus.num_tokens:
        raise DamagedDataError(
            f"the manifest of {root} contradicts itself on split {split!r}: prepare the corpus again"
        )
    return corpus


def num_tokens_of_splits(root: Path, *, flag: str = "--corpus") -> dict[str, int]:
    """Split name → number of tokens, of a complete corpus."""
    return {name: split.num_tokens for name, split in read_corpus_manifest(root, flag=flag).splits.items()}


def read_corpus_manifest(root: Path, *, flag: str = "--corpus") -> CorpusManifest:
    """What a complete corpus says of all its splits; raises as `open_corpus` does. Its tokens may be
    elsewhere: of one at a URL the cache holds what was read."""
    stage: CompleteStage[CorpusManifest] = read_stage(
        CompleteStage, CorpusManifest, root, flag=flag, has_files=False
    )
    return stage.manifest
