"""answers.json: what each arm scored on each set of questions, with intervals and speeds. See README.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.core.manifest import Manifest
from mlpmem_ds.core.record_files import read_record, write_record


@dataclass(frozen=True, kw_only=True)
class AnswersManifest(Manifest):
    """Answered questions: the arms, and how many questions each set has."""

    FORMAT: ClassVar[str] = "answers"
    VERSION: ClassVar[int] = 1

    arms: tuple[str, ...]
    sets: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class ArmScores:
    """`scores`: metric → mean over the questions; `changes`: metric → difference from the base's mean;
    `intervals`: of that difference, 95 %, over the questions. Both are empty for the base.

    `first_token_seconds`: mean, with the search for passages; `tokens_per_second` of whole answers; null
    where nothing was generated.
    """

    arm: str
    scores: Mapping[str, float]
    changes: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    seconds: float
    first_token_seconds: float | None
    tokens_per_second: float | None


@dataclass(frozen=True, kw_only=True)
class SetScores:
    """A set of questions: its kind, `open`, `choice` or `last word`."""

    name: str
    kind: str
    questions: int
    arms: tuple[ArmScores, ...]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """All sets; `arms`: name → what it is; `passages`, `index_bytes`: of the arm that reads passages."""

    arms: Mapping[str, str]
    sets: tuple[SetScores, ...]
    passages: int | None
    index_bytes: int | None
    device: str


def write_answers(path: Path, answers: Answers) -> None:
    """Publish answers.json."""
    write_record(path, answers, kind=AnswersManifest.FORMAT, version=AnswersManifest.VERSION, seal=True)


def read_answers(root: Path) -> Answers:
    """What an `answer_questions` left in OUTPUT.

    Raises:
        DamagedDataError: it is missing, or of another format or version.
    """
    kind, version = AnswersManifest.FORMAT, AnswersManifest.VERSION
    refusal = f"is not mlpmem-{kind} version {version}: run answer_questions again, it writes it anew"
    return read_record(root / "answers.json", Answers, kind=kind, version=version, refusal=refusal)
