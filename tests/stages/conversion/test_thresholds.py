"""A threshold without a gate: one warning, with what it does. The front-ends are tested where they are."""

from __future__ import annotations

import logging

import pytest

from mlpmem_ds.models.mixture import Constant, StoredGate, Weights
from mlpmem_ds.stages.conversion import thresholds


@pytest.mark.parametrize(
    ("threshold", "gates", "num_memories", "said"),
    [
        (None, [Constant(0.3)], 1, ""),
        (0.1, [Constant(0.3)], 1, "it changes nothing"),
        (0.3, [Constant(0.0), Constant(0.3)], 1, "it changes nothing"),
        (0.5, [Constant(0.3)], 1, "it leaves the memory out everywhere, because its weight is 0.3"),
        (0.5, [Constant(0.2), Constant(0.8)], 2, "everywhere, because its weight is 0.1, 0.4"),
        (0.2, [Weights((0.1, 0.4))], 2, "everywhere, because its weight is 0.1"),
    ],
)
def test_what_is_said(
    threshold: float | None,
    gates: list[StoredGate],
    num_memories: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(thresholds, "_logger", logging.getLogger("of this test"))
    thresholds.warn_of_fixed_weights(threshold, gates, num_memories)
    assert len(caplog.records) == bool(said) and said in caplog.text


def test_of_a_gate_nothing_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(thresholds, "_logger", logging.getLogger("of this test"))
    learned = object()
    thresholds.warn_of_fixed_weights(0.5, [Constant(0.0), learned], 1)  # type: ignore[list-item]
    thresholds.warn_of_fixed_weights(0.5, [], 1)
    assert not caplog.records
