"""The figure of a preset: each change with its interval, as far as the axes go."""

from __future__ import annotations

import pytest

from mlpmem_ds.benchmarks.quality.plots import _bar
from mlpmem_ds.engines.plotting import new_figure


@pytest.mark.parametrize(
    ("change", "interval", "shown"),
    [
        (-0.1, (-0.2, 0.1), [-0.2, 0.1]),
        (0.7, (0.5, 0.9), [0.5, 0.6]),
        (-0.5, (-0.7, -0.3), [-0.6, -0.3]),
        (1.5, (1.2, 1.8), None),
    ],
)
def test_an_interval_is_drawn_where_it_lies_within_the_axes(
    change: float, interval: tuple[float, float], shown: list[float] | None
) -> None:
    axes = new_figure(2, 2).subplots(1, 1)
    _bar(axes, 0.0, change, interval, "C0", None)
    assert [list(line.get_xdata()) for line in axes.lines] == ([] if shown is None else [shown])
    assert len(axes.texts) == (abs(change) > 0.6)
