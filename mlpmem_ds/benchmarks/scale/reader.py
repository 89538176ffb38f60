"""Benchmark `scale`, measures of the training reader."""

from __future__ import annotations

from mlpmem_ds.benchmarks.scale.measure import Measure

MEASURES: tuple[Measure, ...] = ()
