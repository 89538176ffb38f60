"""answers.json: what was written is read, another version is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.formats.answers import Answers, ArmScores, SetScores, read_answers, write_answers

ROW = ArmScores(
    arm="other",
    scores={"f1": 0.25},
    changes={"f1": 0.05},
    intervals={"f1": (-0.01, 0.11)},
    seconds=1.5,
    first_token_seconds=None,
    tokens_per_second=None,
)
ANSWERS = Answers(
    arms={"base": "the base alone", "other": "another"},
    sets=(SetScores(name="nq", kind="open", questions=3, arms=(ROW,)),),
    passages=4,
    index_bytes=100,
    device="cpu",
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_answers(tmp_path / "answers.json", ANSWERS)
    assert read_answers(tmp_path) == ANSWERS


def test_another_version_is_refused(tmp_path: Path) -> None:
    publish_json(tmp_path / "answers.json", {"format": "mlpmem-answers", "version": 9})
    with pytest.raises(DamagedDataError, match="is not mlpmem-answers version 1"):
        read_answers(tmp_path)
