"""Benchmark `scale`, measures of files that a rank opens, asks for and hashes."""

from __future__ import annotations

from mlpmem_ds.benchmarks.scale.measure import Measure

MEASURES: tuple[Measure, ...] = ()
