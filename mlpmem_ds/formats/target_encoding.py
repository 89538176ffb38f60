"""Sparse target rows ↔ the arrays of one sample, in two encodings. README.md is the specification.

exact    token ids and float16 probabilities, as they are.
compact  half the bytes. Ids as gaps between ranks in the vocabulary's order of frequency (frequent tokens
         come first, so that gaps are small: 20 % fewer bytes than gaps between ids with a vocabulary of
         50,257); probabilities as whole levels l of p = (l / steps)^1.5, fine where p is large. The power
         that costs least at equal total variation: at .003 the levels of a soft target take 244 B a token,
         those of p = l² 251, of p = l³ 264, of log p 309. `steps` is chosen for each block so that the mean
         total variation from the float64 rows stays below `_TOTAL_VARIATION`.

Both keep the same entries: those that float16 does not round to 0.

Shape legend: n rows (positions) of a block, E their entries, V token ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from mlpmem_ds.maths.sparse_rows import SparseRows

Encoding: TypeAlias = Literal["exact", "compact"]

_POWER = 1.5
_TOTAL_VARIATION = 0.0025  # of the compact encoding, mean over a block's rows
_FIRST_STEPS, _MIN_STEPS, _STEPS_UNIT, _MAX_STEPS = 1024, 256, 64, 32768
_TRIALS, _MAX_EXCESS = 5, 1.1
_WIDE_GAP, _WIDE_LEVEL = 255, 0  # in the byte's place where a gap or a level does not fit in it
_LEVEL_BITS = 16
_ENTRIES_AT_ONCE = 8192
_ARRAYS: dict[str, dict[str, tuple[str, ...]]] = {
    "exact": {"counts": ("<u2",), "ids": ("<u2", "<u4"), "probabilities": ("<f2",), "dropped": ("<f2",)},
    "compact": {
        "counts": ("<u2",),
        "gaps": ("|u1",),
        "wide_gaps": ("<u2", "<u4"),
        "levels": ("|u1",),
        "wide_levels": ("<u2",),
        "dropped": ("|u1",),
    },
}


@dataclass(frozen=True, kw_only=True)
class TargetBlock:
    """One sample as it is stored: its arrays by name, and what `meta.json` says besides first, count and
    entries."""

    first: int
    count: int
    entries: int
    arrays: Mapping[str, np.ndarray]
    details: Mapping[str, Any]


def array_names(encoding: str) -> tuple[str, ...]:
    """The arrays of a sample, in the order of the file; KeyError for an encoding that does not exist."""
    return tuple(_ARRAYS[encoding])


def frequency_order(counts_V: np.ndarray, *, dtype: np.dtype[Any]) -> np.ndarray:
    """Token ids [V] from the most to the least frequent, equal ones by id."""
    return np.argsort(-counts_V, kind="stable").astype(dtype)


def pack_block(
    first: int,
    rows: SparseRows,
    *,
    dtype: np.dtype[Any],
    encoding: Encoding = "exact",
    order_V: np.ndarray | None = None,
) -> TargetBlock:
    """Bring float64 rows of consecutive positions to the precision of the format.

    Entries that float16 rounds to 0 join the dropped mass. ``dtype`` of the ids (uint16 or uint32);
    ``order_V`` of `frequency_order` is what the compact encoding numbers tokens by.
    """
    num_rows, row_of_E = rows.num_rows, rows.row_of_E
    kept_E = rows.probabilities.astype(np.float16) > 0
    lost_n = np.bincount(row_of_E[~kept_E], weights=rows.probabilities[~kept_E], minlength=num_rows)
    row_of_E, ids_E, probabilities_E = row_of_E[kept_E], rows.ids[kept_E], rows.probabilities[kept_E]
    counts_n = np.bincount(row_of_E, minlength=num_rows)
    dropped_n = rows.dropped + lost_n
    if encoding == "exact":
        details: dict[str, Any] = {"version": 1}
        arrays = {
            "counts": counts_n.astype("<u2"),
            "ids": ids_E.astype(dtype),
            "probabilities": probabilities_E.astype("<f2"),
            "dropped": dropped_n.astype("<f2"),
        }
    else:
        assert order_V is not None
        arrays, details = _compact(row_of_E, ids_E, probabilities_E, counts_n, dropped_n, order_V, dtype)
    return TargetBlock(first=first, count=num_rows, entries=len(ids_E), arrays=arrays, details=details)


def unpack_block(block: TargetBlock, encoding: str, order_V: np.ndarray | None) -> SparseRows:
    """The rows of a sample, ids int32, probabilities and dropped mass float32.

    Raises:
        ValueError: the arrays do not fit together.
    """
    arrays = block.arrays
    for name, dtypes in _ARRAYS[encoding].items():
        if arrays[name].dtype.str not in dtypes or arrays[name].ndim != 1:
            raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
    counts_n = arrays["counts"].astype(np.int64)
    offsets = np.zeros(len(counts_n) + 1, np.int64)
    np.cumsum(counts_n, out=offsets[1:])
    lengths = {name: len(arrays[name]) for name in arrays}
    per_entry = [name for name in ("ids", "probabilities", "gaps", "levels") if name in arrays]
    if (len(counts_n), lengths["dropped"]) != (block.count, block.count) or any(
        lengths[name] != block.entries for name in per_entry
    ):
        raise ValueError(f"{block.count} rows and {block.entries} entries do not match arrays of {lengths}")
    if offsets[-1] != block.entries:
        raise ValueError(f"the counts add up to {offsets[-1]} where there are {block.entries} entries")
    if encoding == "exact":
        return SparseRows(
            offsets=offsets,
            ids=arrays["ids"].astype(np.int32),
            probabilities=arrays["probabilities"].astype(np.float32),
            dropped=arrays["dropped"].astype(np.float32),
        )
    assert order_V is not None
    return _expand(block, counts_n, offsets, order_V)


def _compact(
    row_of_E: np.ndarray,
    ids_E: np.ndarray,
    probabilities_E: np.ndarray,
    counts_n: np.ndarray,
    dropped_n: np.ndarray,
    order_V: np.ndarray,
    dtype: np.dtype[Any],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if len(counts_n).bit_length() + _LEVEL_BITS + len(order_V).bit_length() > 63:
        raise ValueError(
            f"a block of {len(counts_n)} rows over {len(order_V)} tokens is too large; use shorter blocks"
        )
    rank_of_V = np.empty(len(order_V), np.int64)
    rank_of_V[order_V.astype(np.int64)] = np.arange(len(order_V))
    place_E = np.argsort(row_of_E * len(order_V) + rank_of_V[ids_E], kind="stable")
    ranks_E, probabilities_E = rank_of_V[ids_E[place_E]], probabilities_E[place_E]
    gaps_E = np.diff(ranks_E, prepend=0) - 1
    starts_E = np.diff(row_of_E, prepend=-1) > 0
    gaps_E[starts_E] = ranks_E[starts_E]
    is_wide_E = gaps_E >= _WIDE_GAP
    levels_E, steps = _levels(row_of_E, probabilities_E, counts_n)
    is_high_E = levels_E > 255
    most = float(dropped_n.max(initial=0.0))
    dropped_step = most / 255
    arrays = {
        "counts": counts_n.astype("<u2"),
        "gaps": np.where(is_wide_E, _WIDE_GAP, gaps_E).astype("u1"),
        "wide_gaps": gaps_E[is_wide_E].astype(dtype),
        "levels": np.where(is_high_E, _WIDE_LEVEL, levels_E).astype("u1"),
        "wide_levels": levels_E[is_high_E].astype("<u2"),
        "dropped": (np.rint(dropped_n / dropped_step) if most > 0 else np.zeros(len(dropped_n))).astype("u1"),
    }
    return arrays, {"version": 2, "steps": steps, "dropped_step": dropped_step}


def _levels(
    row_of_E: np.ndarray, probabilities_E: np.ndarray, counts_n: np.ndarray
) -> tuple[np.ndarray, int]:
    """(level of each entry, at least 1; steps of the block). The error falls as 1/steps or faster, so few
    trials find them."""
    roots_E = probabilities_E ** (1 / _POWER)
    shares_E = (
        probabilities_E / np.bincount(row_of_E, weights=probabilities_E, minlength=len(counts_n))[row_of_E]
    )
    steps: int = _FIRST_STEPS
    for _ in range(_TRIALS):
        levels_E = np.maximum(np.rint(roots_E * steps), 1)
        decoded_E = levels_E**_POWER
        decoded_sums_n = np.bincount(row_of_E, weights=decoded_E, minlength=len(counts_n))
        variation = float(np.abs(shares_E - decoded_E / decoded_sums_n[row_of_E]).sum()) / 2
        excess = variation / max(1, int((counts_n > 0).sum())) / _TOTAL_VARIATION
        needed = int(np.ceil(steps * excess / _STEPS_UNIT)) * _STEPS_UNIT
        needed = max(_MIN_STEPS, min(needed, _MAX_STEPS))
        if needed == steps or _MAX_EXCESS > excess > 1 / _MAX_EXCESS:
            break
        steps = needed
    return np.maximum(np.rint(roots_E * steps), 1).astype(np.int64), steps


def _expand(block: TargetBlock, counts_n: np.ndarray, offsets: np.ndarray, order_V: np.ndarray) -> SparseRows:
    """Compact arrays to rows whose ids ascend and whose probabilities and dropped mass add up to 1."""
    arrays, steps = block.arrays, block.details["steps"]
    if not 1 <= steps <= _MAX_STEPS:
        raise ValueError(f"steps is {steps}")
    gaps_E = _widen(arrays["gaps"], _WIDE_GAP, arrays["wide_gaps"], np.uint32)
    levels_E = _widen(arrays["levels"], _WIDE_LEVEL, arrays["wide_levels"], np.uint16)
    dropped_n = (arrays["dropped"] * np.float64(block.details["dropped_step"])).astype(np.float32)
    if not block.entries:
        no_ids, no_probabilities = np.empty(0, np.int32), np.empty(0, np.float32)
        return SparseRows(offsets=offsets, ids=no_ids, probabilities=no_probabilities, dropped=dropped_n)
    if levels_E.max() > steps or not levels_E.min():
        raise ValueError(f"levels lie in [{levels_E.min()}, {levels_E.max()}], there are {steps}")
    ids_E, probabilities_E = np.empty(block.entries, np.int32), np.empty(block.entries, np.float32)
    groups = list(_row_groups(offsets))
    level_bits, id_bits = steps.bit_length(), len(order_V).bit_length()
    row_bits = max(stop - start for start, stop in groups).bit_length()
    # Row, id and level of an entry in one number. In 32 bits, where they fit, sorting takes half as long.
    dtype = np.uint32 if row_bits + id_bits + level_bits <= 32 else np.int64
    placed_ids_V = order_V.astype(dtype) << dtype(level_bits)
    probability_of_level = (np.arange(steps + 1) / steps) ** _POWER
    for start, stop in groups:
        entries = slice(int(offsets[start]), int(offsets[stop]))
        if entries.start < entries.stop:
            ids_E[entries], probabilities_E[entries] = _expand_rows(
                counts_n[start:stop],
                gaps_E[entries],
                levels_E[entries],
                1 - dropped_n[start:stop].astype(np.float64),
                placed_ids_V,
                level_bits,
                probability_of_level,
            )
    return SparseRows(offsets=offsets, ids=ids_E, probabilities=probabilities_E, dropped=dropped_n)


def _row_groups(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """[start, stop) of rows with few entries together: the arrays at work stay in the allocator's hands and
    in the cache (with all rows of a block at once, page faults took half of the reader's time)."""
    start = 0
    while start < len(offsets) - 1:
        stop = max(
            start + 1, int(np.searchsorted(offsets, offsets[start] + _ENTRIES_AT_ONCE, side="right")) - 1
        )
        yield start, stop
        start = stop


def _expand_rows(
    counts_n: np.ndarray,
    gaps_E: np.ndarray,
    levels_E: np.ndarray,
    kept_n: np.ndarray,
    placed_ids_V: np.ndarray,
    level_bits: int,
    probability_of_level: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, probabilities) of some rows; ``placed_ids_V`` ids above the bits of a level, in the dtype to sort
    them in; ``kept_n`` what each row adds up to."""
    # Ranks: a running sum over all rows (modulo 2^32), less what it was where the row starts.
    ends_E = np.cumsum(gaps_E + np.uint32(1), dtype=np.uint32)
    full_n = np.flatnonzero(counts_n)
    counts_n, kept_n = counts_n[full_n], kept_n[full_n]
    starts = np.cumsum(counts_n) - counts_n
    ranks_E = ends_E - np.repeat(ends_E[starts] - gaps_E[starts], counts_n)
    if ranks_E.max() >= len(placed_ids_V):
        raise ValueError(f"rank {ranks_E.max()} in a vocabulary of {len(placed_ids_V)}")
    # One sort brings the ids of each row in order: row, then id, then level in the low bits.
    id_bits, dtype = len(placed_ids_V).bit_length(), placed_ids_V.dtype.type
    packed_E = placed_ids_V[ranks_E]
    packed_E |= np.repeat(np.arange(len(counts_n), dtype=dtype) << dtype(id_bits + level_bits), counts_n)
    packed_E |= levels_E
    packed_E.sort()
    unscaled_E = probability_of_level[packed_E & dtype((1 << level_bits) - 1)]
    factors_n = kept_n / np.add.reduceat(unscaled_E, starts)
    packed_E >>= dtype(level_bits)
    packed_E &= dtype((1 << id_bits) - 1)
    return packed_E, unscaled_E * np.repeat(factors_n, counts_n)


def _widen(bytes_E: np.ndarray, mark: int, wide: np.ndarray, dtype: Any) -> np.ndarray:
    """Put the wide values where a byte says that it has none."""
    values_E = bytes_E.astype(dtype)
    places = np.flatnonzero(bytes_E == mark)
    if len(places) != len(wide):
        raise ValueError(f"{len(places)} places for {len(wide)} wide values")
    values_E[places] = wide
    return values_E
