"""The compact encoding against its promises: same entries, total variation, any gap and level, arrays that do
not fit refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mlpmem_ds.formats.target_encoding import (
    TargetBlock,
    frequency_order,
    pack_block,
    unpack_block,
)
from mlpmem_ds.maths.sparse_rows import SparseRows

VOCAB_SIZE = 100_000
ORDER = np.random.default_rng(0).permutation(VOCAB_SIZE).astype("<u4")


def make_rows(num_rows: int, most: int, *, sharpness: float, seed: int = 0) -> SparseRows:
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, most, num_rows)
    ids = [np.sort(generator.choice(VOCAB_SIZE, count, replace=False)) for count in counts]
    weights = [np.exp(sharpness * generator.normal(size=count)) for count in counts]
    weights = [np.maximum(row, 1e-6 * row.sum()) for row in weights]  # float16 keeps them
    probabilities = np.concatenate([0.999 * row / row.sum() if len(row) else row for row in weights])
    return SparseRows.from_counts(
        counts, np.concatenate(ids), probabilities, np.where(counts > 0, 0.001, 0.0)
    )


def pack(rows: SparseRows, **changes: object) -> TargetBlock:
    settings = {"dtype": np.dtype("<u4"), "encoding": "compact", "order_V": ORDER} | changes
    return pack_block(40, rows, **settings)  # type: ignore[arg-type]


def variation(found: SparseRows, rows: SparseRows) -> float:
    """Mean over the rows that have entries, of rows brought to sum 1."""
    distances = []
    for start, stop in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        if stop > start:
            p, q = rows.probabilities[start:stop], found.probabilities[start:stop].astype(float)
            distances.append(np.abs(p / p.sum() - q / q.sum()).sum() / 2)
    return float(np.mean(distances))


@pytest.mark.parametrize(("most", "sharpness"), [(9, 0.5), (60, 3.0), (400, 0.3), (400, 2.5)])
def test_compact_keeps_the_entries_and_its_distance(most: int, sharpness: float) -> None:
    rows = make_rows(120, most, sharpness=sharpness)
    found = unpack_block(pack(rows), "compact", ORDER)
    exact = unpack_block(pack(rows, encoding="exact"), "exact", None)
    assert np.array_equal(found.offsets, exact.offsets) and np.array_equal(found.ids, exact.ids)
    assert found.ids.dtype == np.int32 and found.probabilities.dtype == found.dropped.dtype == np.float32
    assert variation(found, rows) < 0.003
    sums = np.add.reduceat(np.append(found.probabilities, 0), found.offsets[:-1])
    full = np.diff(found.offsets) > 0
    assert np.allclose((sums + found.dropped)[full], 1, atol=1e-5) and not found.dropped[~full].any()


def test_every_gap_and_level_comes_back() -> None:
    """Gaps around the byte's end, the first and the last token, p from 1 to what float16 just keeps."""
    ranks = np.cumsum([0, 1, 2, 254, 255, 256, 257, 65_535])
    probabilities = np.array([3e-8, 1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.2, 0.688899])
    both = [(ORDER[ranks], probabilities), (ORDER[[VOCAB_SIZE - 1]], np.ones(1)), (ORDER[:0], np.ones(0))]
    order = [np.argsort(ids) for ids, _ in both]
    rows = SparseRows.from_counts(
        np.array([8, 1, 0]),
        np.concatenate([ids[place] for (ids, _), place in zip(both, order, strict=True)]).astype(np.int64),
        np.concatenate([p[place] for (_, p), place in zip(both, order, strict=True)]),
    )
    block = pack(rows)
    assert block.arrays["wide_gaps"].tolist() == [255, 256, 65_534, VOCAB_SIZE - 1]
    assert len(block.arrays["wide_levels"]) >= 1
    found = unpack_block(block, "compact", ORDER)
    assert found.ids.tolist() == rows.ids.tolist() and found.offsets.tolist() == [0, 8, 9, 9]
    assert np.allclose(found.probabilities, rows.probabilities, rtol=0.03, atol=256**-1.5)
    assert found.probabilities[8] == 1 and (found.probabilities > 0).all()


def test_what_float16_rounds_away_is_dropped_in_both() -> None:
    rows = SparseRows.from_counts(
        np.array([2, 1]), np.array([3, 5, 2]), np.array([1e-9, 0.75, 1e-9]), np.array([0.25, 0.5])
    )
    for encoding in ("exact", "compact"):
        found = unpack_block(pack(rows, encoding=encoding), encoding, ORDER)
        assert found.offsets.tolist() == [0, 1, 1] and found.ids.tolist() == [5]
        assert np.allclose(found.probabilities, 0.75, atol=1e-3)
        assert np.allclose(found.dropped, [0.25, 0.5], atol=1e-3)


def test_empty_blocks() -> None:
    rows = SparseRows.empty(2)
    for encoding in ("exact", "compact"):
        found = unpack_block(pack(rows, encoding=encoding), encoding, ORDER)
        assert found.offsets.tolist() == [0, 0, 0] and not len(found.ids) and found.dropped.tolist() == [0, 0]


def test_frequent_tokens_come_first() -> None:
    order = frequency_order(np.array([3, 0, 9, 3, 0]), dtype=np.dtype("<u2"))
    assert order.tolist() == [2, 0, 3, 1, 4] and order.dtype == np.uint16


def test_a_block_that_does_not_fit_in_a_word_is_refused() -> None:
    rows = SparseRows.empty(2**33 % 7)
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, "<u4"), (2**60,), (0,))
    with pytest.raises(ValueError, match="use shorter blocks"):
        pack(rows, order_V=huge)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("gaps", lambda a: a[:-1], "do not match"),
        ("levels", lambda a: a[:-1], "do not match"),
        ("dropped", lambda a: a[:-1], "do not match"),
        ("counts", lambda a: a + np.uint16(1), "add up to"),
        ("counts", lambda a: a.astype(np.int64), "counts is int64"),
        ("gaps", lambda a: a[None], "gaps is uint8"),
        ("gaps", lambda a: np.full_like(a, 255), "wide values"),
        ("wide_gaps", lambda a: np.append(a, a[:1]), "wide values"),
        ("wide_gaps", lambda a: a + np.uint32(VOCAB_SIZE), "in a vocabulary of 100000"),
        ("wide_levels", lambda a: np.append(a, a[:1]), "wide values"),
        ("wide_levels", lambda a: a * np.uint16(0), "levels lie in"),
        ("wide_levels", lambda a: a * np.uint16(0) + np.uint16(60_000), "levels lie in"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(name: str, change: object, words: str) -> None:
    block = pack(make_rows(30, 40, sharpness=2.0))
    assert len(block.arrays["wide_gaps"]) and len(block.arrays["wide_levels"])
    damaged = dataclasses.replace(block, arrays={**block.arrays, name: change(block.arrays[name])})  # type: ignore[operator]
    with pytest.raises(ValueError, match=words):
        unpack_block(damaged, "compact", ORDER)
    with pytest.raises(ValueError, match="steps is 0"):
        unpack_block(dataclasses.replace(block, details={**block.details, "steps": 0}), "compact", ORDER)
