"""Benchmark `scale`, measures of building an index."""

from __future__ import annotations

from mlpmem_ds.benchmarks.scale.measure import Measure

MEASURES: tuple[Measure, ...] = ()
