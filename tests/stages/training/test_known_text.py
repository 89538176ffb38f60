"""Whether the base was trained on the text: its perplexity on the train split against the tuning split's."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from mlpmem_ds.core.world import World
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.stages.training import train
from mlpmem_ds.stages.training.known_text import train_perplexity, warn_of_known_text


def test_the_sample_is_of_all_units_where_they_are_few(inputs_dir: Path) -> None:
    keys = open_keys(inputs_dir / "keys")
    assert max(block.stop - block.start for block in keys.blocks) <= 4096 and len(keys.blocks) <= 16
    mean = float(np.asarray(keys.read("log_probabilities"), dtype=np.float64).mean())
    assert train_perplexity(keys) == pytest.approx(math.exp(-mean), rel=1e-6)


@pytest.mark.parametrize(("quotient", "is_known"), [(1.0, False), (1.2, False), (1.4, True), (3.0, True)])
def test_a_base_that_knows_the_text_is_named_with_the_remedy(
    inputs_dir: Path, caplog: Any, quotient: float, is_known: bool
) -> None:
    keys = open_keys(inputs_dir / "keys")
    with caplog.at_level(logging.WARNING):
        warn_of_known_text(keys, quotient * train_perplexity(keys))
    assert ("--start random, with --targets" in caplog.text) == is_known


@pytest.mark.parametrize(
    ("start", "rank", "is_said"), [("base", 0, True), ("base", 1, False), ("random", 0, False)]
)
def test_train_says_it_on_rank_0_after_all_ranks_have_met(
    inputs_dir: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch, start: str, rank: int, is_said: bool
) -> None:
    keys = open_keys(inputs_dir / "keys")
    asked: list[int] = []

    class Validator:
        """A base that is three times worse on the tuning split."""

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def base_perplexity(self) -> float:
            asked.append(rank)
            return 3 * train_perplexity(keys)

    monkeypatch.setattr(train, "MemoryValidator", Validator)
    config = SimpleNamespace(start=start, control=None, validation_positions=9)
    inputs = SimpleNamespace(keys=keys, tuning="some", point=None)
    with caplog.at_level(logging.WARNING):
        train._validator(cast(Any, config), cast(Any, inputs), cast(Any, "a base"), World(rank=rank, size=2))
    assert asked == ([rank] if start == "base" else [])
    assert ("was probably trained on this text" in caplog.text) == is_said
