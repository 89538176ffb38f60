"""Tokens at any positions, without a split in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.formats import mapped_tokens
from mlpmem_ds.formats.mapped_tokens import MappedTokens

SIZES = (5, 0, 9, 1, 6)


def split_of_files(root: Path, dtype: str, has_answers: bool) -> tuple[Any, np.ndarray, Counter[str]]:
    """A split of a few files, what it holds (answers as they are, the rest as complements), and how often
    each file was opened."""
    generator, opened = np.random.default_rng(0), Counter[str]()
    tokens = generator.integers(0, 60_000, sum(SIZES)).astype(dtype)
    is_answer = generator.random(len(tokens)) < 0.4 if has_answers else np.ones(len(tokens), bool)
    stops = np.cumsum(SIZES)
    for number, (size, stop) in enumerate(zip(SIZES, stops, strict=True)):
        if size:
            tokens[stop - size : stop].tofile(root / f"tokens-{number}")
            is_answer[stop - size : stop].tofile(root / f"answers-{number}")

    def path_of(name: str) -> Path:
        opened[name] += 1
        return root / name

    numbers = [number for number, size in enumerate(SIZES) if size]
    split = SimpleNamespace(
        token_files=[f"tokens-{number}" for number in numbers],
        answer_files=[f"answers-{number}" for number in numbers],
        dtype=np.dtype(dtype),
        has_answers=has_answers,
        path_of=path_of,
        shard_starts=np.cumsum([0, *(size for size in SIZES if size)]),
        num_tokens=len(tokens),
    )
    wide = tokens.astype(np.int64)
    return split, np.where(is_answer, wide, ~wide), opened


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("has_answers", [False, True])
def test_tokens_are_those_of_the_stream(tmp_path: Path, dtype: str, has_answers: bool) -> None:
    split, expected, opened = split_of_files(tmp_path, dtype, has_answers)
    tokens = MappedTokens(split)
    assert len(tokens) == len(expected) and not opened, "nothing is read before it is asked for"
    everything = tokens[np.arange(len(tokens))]
    assert everything.dtype == np.int64 and np.array_equal(everything, expected)
    positions = np.random.default_rng(1).integers(0, len(tokens), (4, 3))
    assert np.array_equal(tokens[positions], expected[positions])
    assert tokens[np.empty((0, 3), np.int64)].shape == (0, 3)
    assert set(opened.values()) == {1} and len(opened) == 4 * (1 + has_answers)


def test_some_files_stay_mapped_and_only_those_that_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_tokens, "_FILES_KEPT", 2)
    split, expected, opened = split_of_files(tmp_path, "uint16", has_answers=False)
    tokens = MappedTokens(split)
    for place in (0, 6, 0, 20, 6):
        assert tokens[np.array([place])] == expected[place]
    assert opened == {"tokens-0": 1, "tokens-2": 2, "tokens-4": 1}
