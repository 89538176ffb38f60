"""Part of `run_lm_eval`: which documents are asked, on which half λ is chosen, which is reported."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Halves:
    """Numbers of documents, in their order; together those that are asked."""

    tuning: tuple[int, ...]
    reported: tuple[int, ...]

    @property
    def asked(self) -> tuple[int, ...]:
        return tuple(sorted((*self.tuning, *self.reported)))


def split_halves(groups: Sequence[str], limit: int | None) -> Halves:
    """Draw `limit` documents and deal them to two halves, by a hash of their groups.

    Files are often sorted by label, so that their first documents would be of one kind. Documents of a group
    share a half: λ is never chosen on a question that is reported.

    Args:
        groups: of each document, a text that all documents of its group have.
        limit: of the documents that are asked; None = all.
    """
    order = sorted(range(len(groups)), key=lambda number: (_hash(groups[number]), number))[:limit]
    places = {group: place for place, group in enumerate(dict.fromkeys(groups[number] for number in order))}
    halves: tuple[list[int], list[int]] = ([], [])
    for number in sorted(order):
        halves[places[groups[number]] % 2].append(number)
    reported, tuning = halves  # of a single document there is something to report
    return Halves(tuning=tuple(tuning), reported=tuple(reported))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
