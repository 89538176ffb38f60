"""answers.json: what each arm scored on each set of questions, with intervals and speeds. See README.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import publish_json, read_json
from mlpmem_ds.core.manifest import Manifest
from mlpmem_ds.core.typed_json import from_json, to_json


@dataclass(frozen=True, kw_only=True)
class AnswersManifest(Manifest):
    """Answered questions: the arms, and how many questions each set has."""

    FORMAT: ClassVar[str] = "answers"
    VERSION: ClassVar[int] = 1

    arms: tuple[str, ...]
    sets: Mapping[str, int]


_FORMAT = f"mlpmem-{AnswersManifest.FORMAT}"


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
    fields = {"format": _FORMAT, "version": AnswersManifest.VERSION, **to_json(answers)}
    publish_json(path, fields, seal=True)


def read_answers(root: Path) -> Answers:
    """What an `answer_questions` left in OUTPUT.

    Raises:
        DamagedDataError: it is missing, or of another format or version.
    """
    path = root / "answers.json"
    values: Any = read_json(path)
    seen = (values.pop("format", None), values.pop("version", None)) if isinstance(values, dict) else ()
    if seen != (_FORMAT, AnswersManifest.VERSION):
        raise DamagedDataError(
            f"{path} is not {_FORMAT} version {AnswersManifest.VERSION}: run answer_questions again, it"
            " writes it anew"
        )
    return from_json(Answers, values, where=str(path), version=AnswersManifest.VERSION)
