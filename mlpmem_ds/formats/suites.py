"""What a suite of tasks scored: suites.json of `run_lm_eval --suite`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.core.manifest import Manifest
from mlpmem_ds.core.record_files import read_record, write_record


@dataclass(frozen=True, kw_only=True)
class SuitesManifest(Manifest):
    """Scored tasks: how many documents each has, who read them, and which tasks were left out for what
    reason."""

    FORMAT: ClassVar[str] = "suites"
    VERSION: ClassVar[int] = 1

    tasks: Mapping[str, int]
    readers: tuple[str, ...]
    left_out: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class SuiteArm:
    """An arm's mean score on the reported half; `change` from the base and its 95 % `interval`, both null for
    the base. `lmbda`: null where there is none, or a gate."""

    arm: str
    lmbda: float | None
    value: float
    change: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class SuiteMetric:
    """A metric of a task; `chance`: what guessing scores on the reported half; null: no guess can be right.

    `curve` and `tuning_curve`: λ → mean on the reported half, and on the tuning half.
    """

    metric: str
    chance: float | None
    arms: tuple[SuiteArm, ...]
    curve: Mapping[str, float]
    tuning_curve: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class SuiteSpeed:
    """Of generated answers: mean seconds to the first token, with the search for passages, and tokens a
    second of whole answers."""

    arm: str
    first_token_seconds: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """A task: its documents in each half, the metric by which λ was chosen, and that λ (null: no memory).

    `cut`: reader → documents of both halves whose prompt lost its beginning, being longer than it reads.
    """

    name: str
    title: str
    tuning: int
    reported: int
    begin_tokens: bool
    tuned_by: str
    lmbda: float | None
    metrics: tuple[SuiteMetric, ...]
    speeds: tuple[SuiteSpeed, ...]
    seconds: float
    cut: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Suites:
    """All tasks; `arms`: name → what it is; `left_out`: task → reason."""

    suites: tuple[str, ...]
    arms: Mapping[str, str]
    tasks: tuple[TaskScores, ...]
    left_out: Mapping[str, str]
    device: str


def write_suites(path: Path, suites: Suites) -> None:
    """Publish suites.json."""
    write_record(path, suites, kind=SuitesManifest.FORMAT, version=SuitesManifest.VERSION, seal=True)


def read_suites(root: Path) -> Suites:
    """What a `run_lm_eval --suite` left in OUTPUT.

    Raises:
        DamagedDataError: it is missing, or of another format or version.
    """
    kind, version = SuitesManifest.FORMAT, SuitesManifest.VERSION
    refusal = f"is not mlpmem-{kind} version {version}: run run_lm_eval again, it writes it anew"
    return read_record(root / "suites.json", Suites, kind=kind, version=version, refusal=refusal)
