"""The settings of the sweep, and each one's jobs: complete, in order, with flags that their stages take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.quality.plan import Plan
from mlpmem_ds.benchmarks.sweep.settings import (
    ARMS,
    PRESET,
    SWEEP,
    Setting,
    Sweep,
    base_plan,
    setting_plan,
)
from mlpmem_ds.commands import COMMANDS

ROOT = Path("/run")


def _plan(setting: Setting) -> Plan:
    return setting_plan(PRESET, setting, ROOT, base=Path("/base"), num_seeds=2)


def test_one_thing_is_varied_at_a_time_and_the_centre_is_not_measured_twice() -> None:
    settings = SWEEP.settings()
    assert settings[0] == SWEEP.centre and len(set(settings)) == len(settings) == 8
    for setting in settings[1:]:
        assert sum(getattr(setting, axis) != getattr(SWEEP.centre, axis) for axis in SWEEP.axes) == 1
    for axis, values in SWEEP.axes.items():
        assert getattr(SWEEP.centre, axis) in values
        assert [getattr(setting, axis) for setting in SWEEP.along(axis)] == list(values)


def test_a_setting_decides_text_and_epochs() -> None:
    setting = Setting(base_epochs=6, megabytes=0.5, epochs=3)
    jobs = {job.name: job.words for job in _plan(setting).jobs}
    assert jobs["domain/corpus"][jobs["domain/corpus"].index("--max-train-bytes") + 1] == "500000"
    for arm in ARMS:
        words = jobs[f"domain/{arm}-1"]
        assert words[words.index("--epochs") + 1] == "3"
    base = {job.name: job.words for job in base_plan(PRESET, 6, ROOT).jobs}
    assert base["base"][base["base"].index("--epochs") + 1] == "6"
    assert {*base} == {"general/corpus", "base"}


def test_every_size_of_text_is_tuned_and_tested_on_the_same_documents() -> None:
    """Only the limit of the training text differs, and each lies within what the other splits leave."""
    corpora = []
    for setting in SWEEP.along("megabytes"):
        (corpus,) = (job for job in _plan(setting).jobs if job.name == "domain/corpus")
        words = list(corpus.words)
        place = words.index("--max-train-bytes")
        assert float(words.pop(place + 1)) == setting.megabytes * 1e6
        corpora.append(words)
    assert all(words == corpora[0] for words in corpora)
    text = PRESET.domain
    left = text.max_bytes * (1 - text.tuning_fraction - text.test_fraction)
    assert max(SWEEP.axes["megabytes"]) * 1e6 < left


def test_there_is_a_report_a_seed_of_all_arms_and_no_gate() -> None:
    plan = _plan(SWEEP.centre)
    assert [place.name for place in plan.reports] == ["domain/report-0", "domain/report-1"]
    names = [job.name for job in plan.jobs]
    assert not any("gate" in " ".join((job.name, *job.words)) for job in plan.jobs)
    for number, job in enumerate(plan.jobs):
        assert {*job.needs} <= {*names[:number]}, job.name
    (report,) = (job for job in plan.jobs if job.name == "domain/report-0")
    assert all(any(f"{arm}-0" in word for word in report.words) for arm in ARMS)


@pytest.mark.parametrize("plan", [_plan(SWEEP.centre), base_plan(PRESET, 2, ROOT)], ids=["arms", "base"])
def test_every_job_is_a_command_that_its_front_end_takes(plan: Plan) -> None:
    for job in plan.jobs:
        assert job.words[0] in COMMANDS


def test_another_sweep_keeps_the_kinds_of_its_values() -> None:
    sweep = Sweep(centre=replace(SWEEP.centre, epochs=1), axes={"epochs": (1, 2.0)})
    assert [setting.name for setting in sweep.settings()] == [
        "base-20-text-0.15-epochs-1",
        "base-20-text-0.15-epochs-2",
    ]
