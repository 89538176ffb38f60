"""eval.json: written and read whole; what this version does not know is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import publish_json, read_sealed_json
from mlpmem_ds.formats.evaluation import ArmFigures as Arm
from mlpmem_ds.formats.evaluation import (
    Calibration,
    CalibrationBin,
    Change,
    CurvePoint,
    Evaluation,
    Machine,
    Sample,
    Settings,
    Speed,
    SplitFigures,
    read_evaluation,
    write_evaluation,
)
from mlpmem_ds.formats.gates import WeightFigures

FIGURES: dict[str, Any] = {
    "ppl": 2.5,
    "bits_per_byte": 1.0,
    "ppl_change": None,
    "ppl_interval": None,
    "win_rate": None,
}


def make_evaluation() -> Evaluation:
    arm = Arm(
        name="base+x",
        description="x",
        splits={"test": SplitFigures(**FIGURES)},
        lmbda=0.25,
        chosen={"neighbours": 8},
        tried={"neighbours": (2, 8)},
        parameters=3,
        bytes=12,
        tokens=None,
        seconds=1.5,
        tokens_per_second=10.0,
        calibration=Calibration(error=0.1, bins=(CalibrationBin(positions=2, probability=0.5, correct=1.0),)),
        tuning_curve=(CurvePoint(lmbda=0.25, ppl=2.5), CurvePoint(lmbda=1.0, ppl=None)),
        settings={"k": 8},
        weights={"test": WeightFigures(means=(0.25,), mean=0.25, quantiles=(0.0, 0.1, 0.2, 0.4, 1.0))},
        **FIGURES,
    )
    return Evaluation(
        date="now",
        machine=Machine(platform="p", cores=None),
        model="m",
        corpus="c",
        tuning_split="tuning",
        test_split="test",
        extra_splits=(),
        tokens={"test": 9},
        lambdas=(0.0, 0.25, 1.0),
        settings=Settings(
            bootstrap_samples=200,
            bootstrap_block=8,
            block_size=4,
            stride=2,
            dtype="float32",
            device="cpu",
            threads=1,
        ),
        subject="base+x",
        reference=None,
        arms=(arm,),
        recovered_share=None,
        against={"base": Change(ppl_change=-0.1, ppl_interval=(-0.2, 0.0))},
        wins={"base": True},
        breakdowns=(),
        speeds=(Speed(arm="base", keys=None, positions=4, tokens_per_second=2.0),),
        samples=(Sample(prompt="a", base="b", memory="c"),),
    )


def test_an_evaluation_comes_back_from_its_file(tmp_path: Path) -> None:
    evaluation = make_evaluation()
    write_evaluation(tmp_path, evaluation)
    assert read_evaluation(tmp_path) == evaluation
    written = json.loads((tmp_path / "eval.json").read_bytes())
    assert (written["format"], written["version"]) == ("mlpmem-report", 1)
    assert written["arms"][0]["lambda"] == written["arms"][0]["tuning_curve"][0]["lambda"] == 0.25
    assert evaluation.arm("base+x") is evaluation.base


def test_a_report_that_does_not_say_where_its_choices_are_from_made_them_itself(tmp_path: Path) -> None:
    evaluation = make_evaluation()
    write_evaluation(tmp_path, replace(evaluation, choices_from="run/report"))
    assert read_evaluation(tmp_path).choices_from == "run/report"
    found = read_sealed_json(tmp_path / "eval.json")
    del found["choices_from"]
    publish_json(tmp_path / "eval.json", found, seal=True)
    assert read_evaluation(tmp_path) == evaluation


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda found: found.update(more=1), r"unknown key more; this program reads version 1"),
        (lambda found: found["arms"][0].update(came=1), r"unknown key came in arms\[0\]"),
        (lambda found: found.pop("wins"), "key wins is missing"),
        (lambda found: found["settings"].pop("stride"), "key stride is missing in settings"),
        (lambda found: found.update(version=2), "version 2, this program reads mlpmem-report version 1"),
        (lambda found: found.update(format="mlpmem-keys"), "is of 'mlpmem-keys' version 1"),
    ],
)
def test_what_this_version_does_not_know_is_refused(tmp_path: Path, change: Any, fault: str) -> None:
    write_evaluation(tmp_path, make_evaluation())
    found = read_sealed_json(tmp_path / "eval.json")
    change(found)
    publish_json(tmp_path / "eval.json", found, seal=True)
    with pytest.raises(DamagedDataError, match=fault):
        read_evaluation(tmp_path)


def test_a_flipped_digit_is_found_by_the_checksum_that_the_file_carries(tmp_path: Path) -> None:
    write_evaluation(tmp_path, make_evaluation())
    text = (tmp_path / "eval.json").read_text()
    (tmp_path / "eval.json").write_text(text.replace('"ppl": ', '"ppl": 1', 1))
    with pytest.raises(DamagedDataError, match="does not have the checksum that it carries"):
        read_evaluation(tmp_path)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedDataError, match="eval.json is missing"):
        read_evaluation(tmp_path)
    (tmp_path / "eval.json").write_text("[]")
    with pytest.raises(DamagedDataError, match="not a JSON object"):
        read_evaluation(tmp_path)
