"""Benchmark `scale`, measures of writing targets over several ranks."""

from __future__ import annotations

from mlpmem_ds.benchmarks.scale.measure import Measure

MEASURES: tuple[Measure, ...] = ()
