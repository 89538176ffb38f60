"""The section of a preset from made-up results: warnings, losses by name, questions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from mlpmem_ds.benchmarks.quality.preset_section import preset_section
from mlpmem_ds.benchmarks.quality.results import QualityResult, read_result, write_result
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.formats.answers import ArmScores, SetScores

from .conftest import in_one_line, make_result, make_row


def _section(result: QualityResult) -> str:
    return "\n\n".join(preset_section(result, plot="results/tiny.png"))


def test_few_documents_are_a_warning() -> None:
    assert "Fewer than 20 documents: take the intervals" in in_one_line(_section(make_result()))


def test_arms_that_beat_the_memory_are_named() -> None:
    section = in_one_line(_section(make_result()))
    assert "Better than `base+memory` (17.00) on this text: `continued` (16.00)." in section


def test_a_bank_that_beats_the_memory_is_named_too() -> None:
    result = make_result()
    (text,) = result.texts
    text = replace(text, rows=(*text.rows[:3], make_row("base+bank+gate", 16.5)))
    section = in_one_line(_section(replace(result, texts=(text,))))
    assert "Better than `base+memory` (17.00) on this text: `base+bank+gate` (16.50)." in section


def test_models_whose_training_the_schedule_ended_are_named() -> None:
    result = make_result()
    assert "At their best at the last step" not in _section(result)
    (text,) = result.texts
    ended = replace(text.rows[3], epochs_used_up=(2.0, 2.0))
    section = _section(replace(result, texts=(replace(text, rows=(*text.rows[:3], ended)),)))
    assert "so not yet at an end: `continued` (2 epochs, 2 of 3 seeds)." in in_one_line(section)


def test_what_was_not_recorded_of_an_older_result_is_not_said_to_have_ended(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    write_result(path, make_result())
    assert "Not recorded" not in _section(read_result(path))
    record = json.loads(path.read_text())
    for row in record["texts"][0]["rows"]:
        del row["epochs_used_up"]
    publish_json(path, record)
    section = in_one_line(_section(read_result(path)))
    assert "Not recorded whether more epochs might have made these better: `continued`." in section
    assert "At their best at the last step" not in section


def test_a_preset_without_a_memory_has_no_comparison_with_it() -> None:
    result = make_result()
    (text,) = result.texts
    bare = replace(text, rows=(text.rows[0], text.rows[3]))
    assert "Better than" not in _section(replace(result, texts=(bare,), ratios=()))


def test_arms_that_were_left_out_are_named_with_their_package() -> None:
    assert "Left out, because a package was not installed: `lora` (peft)." in in_one_line(
        _section(make_result())
    )


def test_question_sets_stand_with_the_change_against_the_base() -> None:
    scores = {
        "seconds": 9.0,
        "first_token_seconds": None,
        "tokens_per_second": None,
    }
    arms = (
        ArmScores(arm="base", scores={"accuracy": 0.5}, changes={}, intervals={}, **scores),
        ArmScores(
            arm="base+memory",
            scores={"accuracy": 0.49},
            changes={"accuracy": -0.01},
            intervals={"accuracy": (-0.02, 0.005)},
            **scores,
        ),
    )
    asked = SetScores(name="boolq", kind="choice", questions=200, arms=arms)
    section = _section(make_result(questions=(asked,)))
    line = "| boolq (200) | `base+memory` | accuracy | 49.0 | −1.0 | −2.0 … +0.5 | – | – |"
    assert line in section
