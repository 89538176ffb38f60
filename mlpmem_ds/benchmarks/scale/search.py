"""Benchmark `scale`, measures of search among keys."""

from __future__ import annotations

from mlpmem_ds.benchmarks.scale.measure import Measure

MEASURES: tuple[Measure, ...] = ()
