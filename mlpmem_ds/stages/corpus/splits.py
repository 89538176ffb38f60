"""Part of `prepare_corpus`: which documents are taken, and the split of each.

A document stands here as its size, group and hash (about 50 bytes), without its text. Two equal texts have
the same hash and so the same split: no text of the test split is trained on.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.hashing import hash_fraction
from mlpmem_ds.formats.corpus import SPLITS
from mlpmem_ds.stages.corpus.blend import take_by_weight

_logger = logging.getLogger(__name__)
DIGEST_BYTES = 32
NOT_TAKEN = -1


@dataclass(frozen=True, kw_only=True)
class SplitRules:
    """Which documents are taken, and the share of each split; bytes and fractions of bytes."""

    tuning_fraction: float
    test_fraction: float
    heldout_fraction: float
    max_bytes: float | None
    """None: all"""
    max_train_bytes: float | None
    """of the training split, once the others are dealt; None: all"""
    seed: int
    weights: tuple[float, ...] = ()
    """of the inputs; none: all that they hold"""


class SurveyedDocuments:
    """Sizes, groups and hashes of the documents, by number, until they are dealt."""

    def __init__(self, *, with_names: bool) -> None:
        self.sizes = array("q")
        self.group_of = array("q")
        self.groups: dict[str, int] = {}
        self.digests = bytearray()
        self.names: list[str] | None = [] if with_names else None
        self.signatures = bytearray()
        self.inputs: list[Block] = []
        """the documents of each input; set when all are known"""

    def __len__(self) -> int:
        return len(self.sizes)

    def extend(
        self,
        sizes: Sequence[int],
        groups: Iterable[str],
        digests: bytes,
        names: Iterable[str],
        signatures: bytes = b"",
    ) -> None:
        """Some more documents: UTF-8 bytes, groups, SHA-256 digests (32 bytes each), names, and where near
        duplicates are looked for their signatures."""
        self.sizes.extend(sizes)
        self.group_of.extend(self.groups.setdefault(group, len(self.groups)) for group in groups)
        self.digests += digests
        self.signatures += signatures
        if self.names is not None:
            self.names.extend(names)

    def digest(self, number: int) -> str:
        return self.digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES].hex()


def check_splits(split_of: array[int], rules: SplitRules) -> None:
    """Warn of empty splits.

    Raises:
        UserError: nothing for the training split.
    """
    num_taken = len(split_of) - split_of.count(NOT_TAKEN)
    if rules.max_bytes is not None and not num_taken and len(split_of):
        if rules.weights:
            raise UserError(
                f"of --max-bytes {rules.max_bytes:g} each of the {len(rules.weights)} inputs gets a share, by"
                " --weights, that is less than each of its documents: give more, or leave it out for as much"
                " as the weights allow"
            )
        raise UserError(
            f"--max-bytes {rules.max_bytes:g} is less than each of the {len(split_of)} documents of the"
            " inputs: give more, or leave it out for all of them"
        )
    if SPLITS.index("train") not in split_of:
        raise UserError(
            f"the inputs hold {len(split_of)} documents with text, {num_taken} of them "
            "are taken, and none of these is in the training split: give more text or smaller fractions"
        )
    fractions = {
        "tuning": rules.tuning_fraction,
        "test": rules.test_fraction,
        "heldout": rules.heldout_fraction,
    }
    for split, fraction in fractions.items():
        if fraction and SPLITS.index(split) not in split_of:
            _logger.warning(
                "the %s split is empty: every document is larger than its share of the text", split
            )


def deal_documents(documents: SurveyedDocuments, rules: SplitRules) -> array[int]:
    """Each document's split. Held-out groups first, then tuning and test documents, each in the order of a
    hash.

    What would overfill a split's share of the bytes is passed over, so that one long document does not decide
    its size.

    Raises:
        UserError: no document of the training split fits in `max_train_bytes`.
    """
    taken = _sample(documents, rules)
    total = sum(documents.sizes[number] for number in taken)
    names = list(documents.groups)
    heldout_groups: set[str] = set()
    if rules.heldout_fraction:
        by_group: dict[str, int] = {}
        for number in taken:
            group = names[documents.group_of[number]]
            by_group[group] = by_group.get(group, 0) + documents.sizes[number]
        heldout_groups = _fill(by_group, rules.heldout_fraction * total, f"group:{rules.seed}")
    heldout = {documents.groups[name] for name in heldout_groups}
    tuning: set[str] = set()
    test: set[str] = set()
    if rules.tuning_fraction or rules.test_fraction:
        by_text = _bytes_by_text(
            documents, (number for number in taken if documents.group_of[number] not in heldout)
        )
        tuning = _fill(by_text, rules.tuning_fraction * total, f"tuning:{rules.seed}")
        rest = {text: size for text, size in by_text.items() if text not in tuning}
        test = _fill(rest, rules.test_fraction * total, f"test:{rules.seed}")
    in_heldout = {documents.digest(number) for number in taken if documents.group_of[number] in heldout}
    split_of = array("b", [NOT_TAKEN]) * len(documents)
    for number in taken:
        digest = documents.digest(number) if in_heldout or tuning or test else ""
        if documents.group_of[number] in heldout or digest in in_heldout:
            split = "heldout"
        else:
            split = "tuning" if digest in tuning else "test" if digest in test else "train"
        split_of[number] = SPLITS.index(split)
    if rules.max_train_bytes is not None:
        _limit_training(documents, split_of, rules.max_train_bytes, rules.seed)
    return split_of


def _bytes_by_text(documents: SurveyedDocuments, numbers: Iterable[int]) -> dict[str, int]:
    """Digest → the bytes of all these documents that have it."""
    by_text: dict[str, int] = {}
    for number in numbers:
        digest = documents.digest(number)
        by_text[digest] = by_text.get(digest, 0) + documents.sizes[number]
    return by_text


def _limit_training(documents: SurveyedDocuments, split_of: array[int], max_bytes: float, seed: int) -> None:
    """Leave documents in the training split in the order of a hash, as long as they fit, and take out the
    others."""
    train = SPLITS.index("train")
    numbers = [number for number, split in enumerate(split_of) if split == train]
    left = _fill(_bytes_by_text(documents, numbers), max_bytes, f"train:{seed}")
    if numbers and not left:
        raise UserError(
            f"--max-train-bytes {max_bytes:g} is less than each of the {len(numbers)} documents of the"
            " training split: give more, or leave it out for all of them"
        )
    for number in numbers:
        if documents.digest(number) not in left:
            split_of[number] = NOT_TAKEN


def _sample(documents: SurveyedDocuments, rules: SplitRules) -> Iterable[int]:
    """Documents in hash order of their groups, as long as they fit in `max_bytes`; what does not fit is
    passed over. With weights each input has a sample of its own."""
    if rules.weights and documents.names is not None:
        return take_by_weight(
            documents.sizes,
            documents.names,
            documents.inputs,
            rules.weights,
            max_bytes=rules.max_bytes,
            seed=rules.seed,
        )
    if rules.max_bytes is None or documents.names is None:
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
