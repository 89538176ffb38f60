"""Part of `evaluate`: the tuning split, on which λ is chosen, and the splits that are reported.

N positions of a split.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.hashing import hash_fraction
from mlpmem_ds.formats.corpus import CorpusSplit, num_tokens_of_splits, open_corpus

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Split:
    """What is scored as one: all positions of a stream, or those of half its documents; none whose value is a
    begin token, and of conversations whose answers alone count no others."""

    name: str
    corpus: CorpusSplit
    positions: np.ndarray | None
    """int64, ascending, of the stream; None: all"""
    num_bytes: int

    @property
    def num_positions(self) -> int:
        return self.corpus.num_positions if self.positions is None else len(self.positions)

    @property
    def scored_positions(self) -> np.ndarray:
        """int64 [N]: where the split's rows stand in the stream."""
        return np.arange(self.corpus.num_positions) if self.positions is None else self.positions

    def document_starts(self) -> np.ndarray:
        """int64: where each document begins among the scored positions."""
        documents_N = self.corpus.documents_of(self.scored_positions)
        return np.flatnonzero(np.diff(documents_N, prepend=-1))

    def take(self, scores_N: np.ndarray) -> np.ndarray:
        """This split's rows of its stream's scores."""
        return scores_N if self.positions is None else scores_N[self.positions]


def open_splits(
    root: Path, *, tuning: str, test: str, extra: Sequence[str], is_extra_requested: bool, min_positions: int
) -> dict[str, Split]:
    """Tuning, test and those further splits that the corpus has, in this order.

    The documents of a corpus that has only a training split are dealt to tuning and test by their names.

    Args:
        root: of the corpus.
        tuning, test, extra: names.
        is_extra_requested: whether a further split that is missing is worth a line in the log.
        min_positions: fewer are refused.

    Raises:
        UserError: a split is missing or too short, or the training split that is dealt is reported as well.
    """
    present = {name for name, tokens in num_tokens_of_splits(root).items() if tokens >= 2}
    for name in extra:
        if name not in present and is_extra_requested:
            _logger.info("the corpus has no split %s: the report goes without it", name)
    if present == {"train"} and "train" not in (tuning, test):
        if "train" in extra:
            raise UserError(
                "--extra-splits train: the corpus has no other split, and its documents are dealt to"
                f" {tuning} and {test}: leave train out"
            )
        splits = _deal_halves(open_corpus(root, "train"), tuning, test)
    else:
        names = [tuning, test, *(name for name in extra if name in present)]
        splits = {name: _whole_split(open_corpus(root, name)) for name in names}
    for split in splits.values():
        if split.num_positions < min_positions or split.num_bytes == 0:
            raise UserError(
                f"the {split.name} split has {split.num_positions:,} positions, and the intervals need more"
                f" than one block of --bootstrap-block {min_positions - 1}: give more text or a smaller"
                " block"
            )
    return splits


def open_tuning_split(root: Path, name: str, *, flag: str, min_positions: int) -> Split:
    """The tuning split of a corpus, as `open_splits` gives it.

    Raises:
        UserError: there is none, or it has fewer positions.
    """
    present = {split for split, tokens in num_tokens_of_splits(root).items() if tokens >= 2}
    if present == {"train"} and name != "train":
        split = _deal_halves(open_corpus(root, "train", flag=flag), name, "test")[name]
    elif name not in present:
        raise UserError(
            f"{flag} {root} has no split {name} ({', '.join(sorted(present))}): prepare it with"
            " --tuning-fraction, or give --tuning-split"
        )
    else:
        split = _whole_split(open_corpus(root, name, flag=flag))
    if split.num_positions < min_positions:
        raise UserError(
            f"the {name} split of {flag} {root} has {split.num_positions:,} positions, and a gate needs"
            f" {min_positions:,} or more: give more text, or prepare it with a larger"
            " --tuning-fraction"
        )
    return split


def _whole_split(corpus: CorpusSplit) -> Split:
    is_scored_N = _is_scored(corpus)
    positions = None if is_scored_N is None else np.flatnonzero(is_scored_N)
    return Split(name=corpus.name, corpus=corpus, positions=positions, num_bytes=corpus.num_bytes)


def _is_scored(corpus: CorpusSplit) -> np.ndarray | None:
    """bool [N]: whether a position's value is scored; None where all are."""
    is_given_N = _is_given(corpus)
    if not corpus.has_answers:
        return None if is_given_N is None else ~is_given_N
    is_counted_N = corpus.counted(0, corpus.num_positions)
    return is_counted_N if is_given_N is None else is_counted_N & ~is_given_N


def _is_given(corpus: CorpusSplit) -> np.ndarray | None:
    """bool [N]: the value is a begin token, which stands before every document: no model predicts it, and a
    base that never did would be charged for it. None where there are no such tokens."""
    num_begin = len(corpus.begin_of_document_ids)
    if num_begin == 0:
        return None
    starts = np.concatenate([[0], corpus.document_stops[:-1]])
    given = (starts[:, None] + np.arange(-1, num_begin - 1)).ravel()  # the value of n is token n + 1
    is_given_N = np.zeros(corpus.num_positions, dtype=bool)
    is_given_N[given[(given >= 0) & (given < corpus.num_positions)]] = True
    return is_given_N


def _deal_halves(corpus: CorpusSplit, tuning: str, test: str) -> dict[str, Split]:
    is_tuning = np.array(
        [hash_fraction(f"evaluate:{document['name']}") < 0.5 for document in corpus.documents]
    )
    size = "answer_bytes" if corpus.has_answers else "bytes"
    sizes = np.array([document[size] for document in corpus.documents])
    document_of_N = corpus.documents_of(np.arange(corpus.num_positions))
    found_N = _is_scored(corpus)
    is_scored_N = np.ones(corpus.num_positions, dtype=bool) if found_N is None else found_N
    _logger.info(
        "the corpus is not split: its %d documents are dealt to %s and %s by their names",
        len(sizes),
        tuning,
        test,
    )
    return {
        name: Split(
            name=name,
            corpus=corpus,
            positions=np.flatnonzero(chosen[document_of_N] & is_scored_N),
            num_bytes=int(sizes[chosen].sum()),
        )
        for name, chosen in ((tuning, is_tuning), (test, ~is_tuning))
    }


def streams_of(splits: Mapping[str, Split]) -> dict[str, CorpusSplit]:
    """The corpus splits that are scored, by name: two halves of one stream are scored together."""
    return {split.corpus.name: split.corpus for split in splits.values()}
