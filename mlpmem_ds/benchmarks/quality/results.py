"""Part of `quality`: what a preset found, as records; written as JSON, from which the page is made.

Perplexities are of the test split, at choices made on the tuning split. A change is relative to the base
(-0.05: five per cent less perplexity). An interval holds every seed's own 95 % interval (bootstrap.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlpmem_ds.benchmarks.result_files import read_record, write_record
from mlpmem_ds.core.typed_json import added_later
from mlpmem_ds.formats.answers import SetScores

FORMAT, VERSION = "quality", 2
FILE_NAME = "quality.json"
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ArmRow:
    """An arm on the text that it was trained on, and what it does to the other text."""

    arm: str
    description: str
    seeds: int
    """trainings of it; 1 for an arm that no seed changes"""
    ppl: float
    """exp of the mean over the seeds of the negative log-probability"""
    ppl_by_seed: tuple[float, ...]
    change: float | None
    """None, as the interval, for the base"""
    interval: Interval | None
    bits_per_byte: float
    calibration_error: float
    lambdas: tuple[float, ...]
    """chosen, by seed; () for an arm without"""
    other_change: float | None
    """on the other text, at the choices made on this one; None where it was not tested there"""
    other_interval: Interval | None
    parameters: int
    """with the base's"""
    tokens: int | None
    """read to make it, beyond the base, mean over the seeds of which it is known"""
    seconds: float | None
    """that its stages took beyond the base, mean over the seeds of which it is known"""
    epochs_used_up: tuple[float, ...] | None = field(default=None, metadata=added_later())
    """of a model: the epochs of each training whose best step was the last of its schedule; None: not
    recorded"""


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """One of the texts, and the arms that were trained on it."""

    name: str
    title: str
    positions: Mapping[str, int]
    """of the splits train, tuning, test"""
    documents: int
    """of the test split"""
    other: str | None
    """title of the other text, of the rows' `other_change`"""
    rows: tuple[ArmRow, ...]


@dataclass(frozen=True, kw_only=True)
class RatioResult:
    """One ratio on one text."""

    name: str
    text: str
    value: float | None
    """mean over the seeds; None: what it is a share of gained nothing with some seed"""
    interval: Interval | None
    by_seed: tuple[float | None, ...]
    goal: str
    """in words, such as `at least 1`"""
    is_met: bool
    """by the value"""
    is_clear: bool
    """the whole interval meets the goal, or none of it, and nearly every draw of documents has a value"""
    meaning: str


@dataclass(frozen=True, kw_only=True)
class QualityResult:
    """All that one preset found."""

    preset: str
    date: str
    machine: str
    versions: Mapping[str, str]
    settings: Mapping[str, str]
    """flags of the run, in words, without those of its seeds"""
    seeds: tuple[int, ...]
    """numbers of the seeds, increasing"""
    left_out: tuple[str, ...]
    """arms of the preset whose package was not installed"""
    base: str
    """in words"""
    texts: tuple[TextResult, ...]
    ratios: tuple[RatioResult, ...]
    questions: tuple[SetScores, ...]
    """question sets, as `answer_questions` scored them; () where none were asked"""
    job_seconds: Mapping[str, float]


def write_result(path: Path, result: QualityResult) -> None:
    write_record(path, result, kind=FORMAT, version=VERSION)


def read_result(path: Path) -> QualityResult:
    """Raises DamagedDataError as `read_record`."""
    return read_record(path, QualityResult, kind=FORMAT, version=VERSION, maker="the benchmark")
