"""Part of `prepare_corpus`: several inputs blended by weight: what is taken of each, and the reached shares.

A weight is the share of an input in the bytes of the text that is taken. Documents of an input are taken in
the order of a hash of their names, each of them once, so that the choice depends on names, sizes and seed
alone. Without `--max-bytes` the blend is as large as the input with the least text for its weight allows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.hashing import hash_fraction
from mlpmem_ds.formats.corpus import SPLITS, BlendedInput, SplitCounts

_logger = logging.getLogger(__name__)
_FAR_FROM_ASKED = 0.01
"""difference of shares that is told as a warning"""


def take_by_weight(
    sizes: Sequence[int],
    names: Sequence[str],
    inputs: Sequence[Block],
    weights: Sequence[float],
    *,
    max_bytes: float | None,
    seed: int,
) -> list[int]:
    """Numbers of the documents that are taken, ascending.

    Args:
        sizes: bytes of each document.
        names: of each document.
        inputs: the documents of each input.
        weights: of the inputs; their sum is the whole.
        max_bytes: of the blend; None: as many as give every input its share.
        seed: of the hashes.

    Raises:
        UserError: an input holds no text.
    """
    shares = _shares(weights)
    available = [sum(sizes[number] for number in range(*numbers)) for numbers in inputs]
    for place, num_bytes in enumerate(available):
        if not num_bytes:
            raise UserError(
                f"--weights: the input {place + 1} of {len(inputs)} holds no text, and its weight is"
                f" {weights[place]:g}: leave out both, or name an input with text"
            )
    if max_bytes is None:
        total = min(Fraction(size) / share for size, share in zip(available, shares, strict=True))
    else:
        total = Fraction(max_bytes)
    taken = []
    for numbers, share in zip(inputs, shares, strict=True):
        quota, size = math.floor(share * total), 0
        ranks = {number: hash_fraction(f"blend:{names[number]}", seed) for number in range(*numbers)}
        for number in sorted(ranks, key=lambda number: (ranks[number], number)):
            if size + sizes[number] <= quota:
                taken.append(number)
                size += sizes[number]
    return sorted(taken)


def _shares(weights: Sequence[float]) -> list[Fraction]:
    total = sum(map(Fraction, weights))
    return [Fraction(weight) / total for weight in weights]


def count_blend(
    inputs: Sequence[str],
    weights: Sequence[float],
    available: Sequence[tuple[int, int]],
    units_of_inputs: Sequence[Sequence[Mapping[str, Any]]],
) -> tuple[BlendedInput, ...]:
    """What of each input is in the corpus.

    Args:
        inputs: as they were named.
        weights: of the inputs.
        available: documents and bytes of each input, taken or not.
        units_of_inputs: the summaries of the units of each: split → counts.
    """
    blend = []
    for name, share, (documents, num_bytes), units in zip(
        inputs, _shares(weights), available, units_of_inputs, strict=True
    ):
        splits = {
            split: SplitCounts(
                **{
                    f"num_{field}": sum(unit[split][field] for unit in units if split in unit)
                    for field in ("documents", "bytes", "tokens")
                }
            )
            for split in SPLITS
        }
        blend.append(
            BlendedInput(
                input=name,
                weight=float(share),
                available_documents=documents,
                available_bytes=num_bytes,
                splits={split: counts for split, counts in splits.items() if counts.num_documents},
            )
        )
    return tuple(blend)


def describe_blend(blend: Sequence[BlendedInput]) -> list[str]:
    """The lines of the table at the end: asked and reached shares, and what is left of each input."""
    totals = {field: sum(getattr(one, field) for one in blend) for field in _COUNTED}
    lines = []
    for one in blend:
        shares = [_percent(getattr(one, field), totals[field]) for field in _COUNTED]
        splits = ", ".join(
            f"{split} {_percent(counts.num_bytes, sum(_bytes_in(other, split) for other in blend))}"
            for split, counts in one.splits.items()
        )
        lines.append(
            f"blended   {one.input}: asked {one.weight:.1%}, reached {shares[0]} of the bytes, {shares[1]} of"
            f" the tokens, {shares[2]} of the documents; of the bytes of {splits or 'no split'};"
            f" {one.num_bytes:,} of its {one.available_bytes:,} bytes are taken"
        )
    return lines


_COUNTED = ("num_bytes", "num_tokens", "num_documents")


def warn_of_blend(blend: Sequence[BlendedInput], max_bytes: float | None) -> None:
    """Say where a share was not reached, and which input is used up."""
    total = sum(one.num_bytes for one in blend)
    for one in blend:
        reached = one.num_bytes / max(total, 1)
        if abs(reached - one.weight) <= _FAR_FROM_ASKED:
            continue
        asked = one.weight * (total if max_bytes is None else max_bytes)
        if reached > one.weight:
            why = "others have less than their share"
        elif one.available_bytes < asked:
            why = (
                f"it holds {one.available_bytes:,} bytes, and its weight asks for {asked:,.0f}: nothing is"
                " repeated; give it more text, a smaller weight, or a smaller --max-bytes"
            )
        else:
            why = (
                f"of {asked:,.0f} bytes there are {one.num_bytes:,}: its documents are too large to fill its"
                " share, or some were left out after the choice (near duplicates, --max-train-bytes); give"
                " more text or another weight"
            )
        _logger.warning(
            "--weights: %s reaches %.1f %% of the bytes in place of %.1f %%: %s",
            one.input, 100 * reached, 100 * one.weight, why,
        )  # fmt: skip


def _bytes_in(one: BlendedInput, split: str) -> int:
    return one.splits[split].num_bytes if split in one.splits else 0


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"
