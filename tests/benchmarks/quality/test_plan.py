"""The plan: each job after what it needs, and nothing is made twice for two arms."""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.quality.arms import (
    BANK,
    BASE,
    ENSEMBLE,
    ENSEMBLE_GATE,
    GATE,
    KNN,
    KNN_INDEX,
    MEMORIES,
    MODELS,
    SECOND_MODELS,
    description_of,
)
from mlpmem_ds.benchmarks.quality.plan import Planner, make_plan
from mlpmem_ds.benchmarks.quality.presets import PRESETS
from mlpmem_ds.commands import COMMANDS
from mlpmem_ds.core.config import parse_config

ROOT = Path("/run")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_each_job_stands_once_and_after_those_that_it_needs(preset) -> None:
    base = None if preset.base is not None else "model"
    plan = make_plan(preset, ROOT, seeds=range(3), base=base)
    names = [job.name for job in plan.jobs]
    assert len(set(names)) == len(names)
    for number, job in enumerate(plan.jobs):
        assert {*job.needs} <= {*names[:number]}, job.name
        assert {*job.budget_of} <= {*job.needs}
        assert job.expected_seconds > 0


def test_all_trainings_of_a_preset_have_one_precision() -> None:
    for preset, name in ((PRESETS["tiny"], "cpu.json"), (PRESETS["real"], "zero1.json")):
        plan = make_plan(preset, ROOT, seeds=[0], base=None if preset.base is not None else "model")
        given = {
            Path(str(job.words[job.words.index("--ds_config") + 1])).name
            for job in plan.jobs
            if "--ds_config" in job.words
        }
        assert given == {name}


def test_the_default_recipe_starts_as_the_base_on_text_that_is_new_to_it() -> None:
    for name, known in (("tiny", {"general"}), ("small", {"general"}), ("real", set())):
        preset = PRESETS[name]
        plan = make_plan(preset, ROOT, seeds=[0], base=None if preset.base is not None else "model")
        for job in plan.jobs:
            text, _, arm = job.name.partition("/")
            if job.words[0] == "train":
                starts_as_base = arm in ("memory-0", "memory_ce-0") and text not in known
                assert ("--start" in job.words) == starts_as_base, job.name


def test_models_are_trained_at_the_rate_of_a_base_of_that_size() -> None:
    for name, rate in (("tiny", "2e-3"), ("small", "1e-3"), ("real", None)):
        preset = PRESETS[name]
        plan = make_plan(preset, ROOT, seeds=[0], base=None if preset.base is not None else "model")
        for job in plan.jobs:
            if job.words[0] == "train-baseline" and "continued" in job.words:
                given = dict(zip(job.words, job.words[1:], strict=False)).get("--learning-rate")
                assert given == rate, job.name


def test_a_model_from_scratch_reads_the_text_as_often_as_base_and_memory_together() -> None:
    """It learns there what the base learnt, too."""
    jobs = {job.name: job.words for job in make_plan(PRESETS["tiny"], ROOT, seeds=[0], base=None).jobs}
    epochs = {
        name: float(words[words.index("--epochs") + 1]) for name, words in jobs.items() if "--epochs" in words
    }
    assert epochs["general/bigger-0"] == epochs["base"] + epochs["general/memory-0"] == 30
    assert epochs["domain/continued-0"] == epochs["domain/memory-0"] == 10


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_texts_are_extracted_once_and_every_arm_is_trained_with_every_seed(preset) -> None:
    base = None if preset.base is not None else "model"
    plan = make_plan(preset, ROOT, seeds=range(3), base=base)
    counts = Counter(job.words[0] for job in plan.jobs)
    assert counts["prepare-corpus"] == 2
    assert counts["extract-keys"] == 4  # of each text what either recipe reads
    assert counts["write-targets"] == 4
    arms = [arm for text in (preset.general, preset.domain) for arm in text.arms]
    assert {*arms} <= {*MEMORIES, *MODELS}
    assert counts["train"] == 3 * sum(arm in MEMORIES for arm in arms)
    models = [arm for arm in arms if arm in MODELS and arm not in plan.left_out]
    assert counts["train-baseline"] == 3 * len(models)
    ensembles = [any(arm in SECOND_MODELS for arm in text.arms) for text in (preset.general, preset.domain)]
    assert ensembles[1]
    assert counts["fit-gate"] == 3 * (3 + sum(ensembles))  # each subject's, the bank's, each ensemble's
    of_ensembles = ensembles[0] + 2 * ensembles[1]  # the domain's on the general text too
    assert counts["evaluate"] == len(plan.reports) == 3 * (5 + of_ensembles)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_the_gated_ensemble_has_jobs_of_its_own_and_changes_no_other(
    preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that an output that was made without it continues with these jobs alone."""
    flags = {"seeds": [0, 1], "base": None if preset.base is not None else "model", "questions": [Path("a")]}
    jobs = make_plan(preset, ROOT, **flags).jobs
    monkeypatch.setattr(Planner, "add_gated_ensembles", lambda *_: None)
    without = make_plan(preset, ROOT, **flags).jobs
    new = [job for job in jobs if job not in without]
    assert [job for job in jobs if job in without] == list(without)
    assert new and all("ensemble-" in job.name or "ensemble_on_" in job.name for job in new)
    assert not {need for job in without for need in job.needs} & {job.name for job in new}


def test_the_gate_of_the_ensemble_is_fitted_as_the_subjects_is() -> None:
    jobs = {job.name: job for job in make_plan(PRESETS["tiny"], ROOT, seeds=[0], base=None).jobs}
    for text, model in (("domain", "continued"), ("general", "bigger")):
        words = [list(jobs[f"{text}/{name}-0"].words) for name in ("gate", "gate_ensemble")]
        memory, second = words[0].index("--memory"), words[1].index("--ensemble")
        assert words[1].pop(second + 1) == f"/run/{text}/{model}-0"
        assert words[0].pop(memory + 1) == f"/run/{text}/memory-0"
        words[0].remove("--memory")
        words[1].remove("--ensemble")
        assert words[0] == words[1]


def test_every_arm_has_a_description() -> None:
    for arm in (
        BASE,
        KNN,
        KNN_INDEX,
        GATE,
        BANK,
        ENSEMBLE,
        ENSEMBLE_GATE,
        *MODELS,
        *(f"base+{name}" for name in MEMORIES),
    ):
        assert description_of(arm)[0].islower() or description_of(arm)[0] in "`k"


def test_the_description_of_an_arm_names_a_schedule_that_is_not_the_trainers_own() -> None:
    for arm in MODELS.values():
        assert ("constant rate" in arm.description) == ("constant" in arm.flags)


def test_an_arm_whose_package_is_missing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plan = make_plan(PRESETS["tiny"], ROOT, seeds=[0], base=None)
    assert plan.left_out == ("lora",)
    assert not any("lora" in job.name for job in plan.jobs)


def test_exact_search_is_done_once() -> None:
    plan = make_plan(PRESETS["tiny"], ROOT, seeds=range(3), base=None)
    with_keys = [job.name for job in plan.jobs if job.words[0] == "evaluate" and "--keys" in job.words]
    assert with_keys == ["general/report-0", "domain/report-0"]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_every_job_has_flags_that_its_command_takes(preset) -> None:
    base = None if preset.base is not None else "model"
    for job in make_plan(preset, ROOT, seeds=[0], base=base, questions=[Path("a.jsonl")]).jobs:
        module, _, name = COMMANDS[job.words[0]].config.partition(":")
        config = getattr(importlib.import_module(f"mlpmem_ds.stages.{module}"), name)
        budget = ["--time-budget-seconds", "60"] if job.budget_of else []
        parse_config(config, [*job.words[1:], "--output", "out", *budget], prog=job.name)
