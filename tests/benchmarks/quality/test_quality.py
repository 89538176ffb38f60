"""A whole preset at toy size, its stages in this process: from text to the page, and continued."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mlpmem_ds import commands
from mlpmem_ds.benchmarks.quality import quality
from mlpmem_ds.benchmarks.quality.jobs import JobRunner
from mlpmem_ds.benchmarks.quality.plan import Planner, make_plan
from mlpmem_ds.benchmarks.quality.presets import TINY, Preset
from mlpmem_ds.benchmarks.quality.quality import Config, run_preset
from mlpmem_ds.benchmarks.quality.results import read_result, write_result
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.shipped import ds_configs
from mlpmem_ds.core.world import World


@dataclass
class Ended:
    """A front-end that ran in this process."""

    code: int

    def poll(self) -> int:
        return self.code

    def terminate(self) -> None:
        return

    kill = terminate

    def wait(self, seconds: float) -> bool:
        return True


def _write_text(path: Path, words: Sequence[str], *, length: int, seed: int) -> None:
    """Documents of `length` sentences, which repeat, so that there is something to learn."""
    draw = random.Random(seed)
    sentences = [" ".join(draw.choices(words, k=9)) + "." for _ in range(60)]
    with open(path, "w", encoding="utf-8") as stream:
        for number in range(30):
            text = " ".join(draw.choices(sentences, k=length))
            stream.write(json.dumps({"text": text, "name": f"document {number}"}) + "\n")


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    general, domain = tmp_path / "general.jsonl", tmp_path / "domain.jsonl"
    known = ["river", "stone", "walks", "under", "seven", "lamps", "and", "sleeps"]
    _write_text(general, known, length=14, seed=1)
    new = ["valve", "torque", "must", "exceed", "nine", "units", "before", "start"]
    _write_text(domain, new, length=5, seed=2)  # a word of it is several tokens
    fractions = {"max_bytes": 1e6, "tuning_fraction": 0.2, "test_fraction": 0.2, "flags": ()}
    return replace(
        TINY,
        name="tiny",
        general=replace(TINY.general, inputs=(str(general),), arms=("memory",), **fractions),
        domain=replace(
            TINY.domain,
            inputs=(str(domain),),
            arms=("memory", "continued"),
            **fractions,
        ),
        vocab_size=400,
        base=("--num-layers", "1", "--hidden-size", "32"),
        base_epochs=2,
        block_size=64,
        stride=64,
        k=16,
        neighbour_perplexity=8,
        memory=("--num-blocks", "1", "--batch-positions", "512"),
        epochs=1,
        model_epochs=1,
    )


def test_from_text_to_the_page_and_again_without_a_stage(
    preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def launch(words: Sequence[str], log: Path, threads: int) -> Ended:
        started.append(words[0])
        return Ended(commands.main(list(words)))

    def make_runner(root: Path, jobs: int | None) -> JobRunner:
        return JobRunner(root=root, at_once=1, cores=1, launch=launch)

    monkeypatch.setattr(quality, "runner_of", make_runner)
    page = tmp_path / "docs" / "RESULTS.md"
    page.parent.mkdir()
    config = Config(output=tmp_path / "run", seeds=1, page=page)
    with monkeypatch.context() as before:  # an output of a time without the gated ensemble
        before.setattr(Planner, "add_gated_ensembles", lambda *_: None)
        former = run_preset(preset, config)
    started.clear()
    result = run_preset(preset, config)
    assert started == ["fit-gate", "evaluate", "evaluate"]
    (rows, former_rows) = ([row for row in one.texts[1].rows] for one in (result, former))
    assert [row for row in rows if row.arm != "base+ensemble+gate"] == former_rows
    assert read_result(tmp_path / "run" / "quality.json") == result
    general, domain = result.texts
    arms = {row.arm: row for row in domain.rows}
    assert {"base", "base+knn_exact", "base+memory", "base+memory+gate", "continued"} <= {*arms}
    assert arms["base+memory"].other_change is not None
    assert arms["continued"].other_change is not None
    assert arms["base+ensemble+gate"].other_change is not None
    assert arms["base+ensemble+gate"].parameters > arms["base+ensemble"].parameters
    assert "base+bank+gate" in arms and general.other is None
    names = {ratio.name for ratio in result.ratios if ratio.text == "domain"}
    assert {"recovered_share", "gate_out_of_domain_ppl_over_base", "bank_share_of_own_gain"} <= names
    assert {
        "memory_ppl_over_gated_ensemble",
        "memory_out_of_domain_ppl_over_gated_ensemble",
    } <= names
    assert "base+memory+gate" in page.read_text()
    started.clear()
    again = run_preset(preset, config)
    assert not started
    assert again.texts == result.texts and again.ratios == result.ratios
    other = tmp_path / "other.json"
    write_result(other, replace(result, seeds=(1,)))
    both = run_preset(preset, replace(config, join=(other,)))
    assert not started and both.seeds == (0, 1)
    assert read_result(tmp_path / "run" / "quality.json") == both
    (text,) = (text for text in result.texts if text.name == "domain")
    write_result(other, replace(result, seeds=(1,), texts=(result.texts[0], replace(text, documents=1))))
    with pytest.raises(UserError, match="the texts differ"):
        run_preset(preset, replace(config, join=(other,)))
    assert read_result(tmp_path / "run" / "quality.json").seeds == (0,)


def test_a_file_as_output_and_a_page_in_no_folder_are_refused(preset: Preset, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file: name a directory"):
        run_preset(preset, Config(output=tmp_path / "file"))
    with pytest.raises(UserError, match="does not exist; make it first"):
        run_preset(preset, Config(output=tmp_path / "run", page=tmp_path / "no" / "RESULTS.md"))


def test_questions_that_cannot_be_read_are_refused_before_anything_is_made(
    preset: Preset, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").touch()
    for name, fault in (("none.jsonl", "none.jsonl"), ("empty.jsonl", "write one JSON object a line")):
        with pytest.raises(UserError, match=f"--questions .*{fault}"):
            run_preset(preset, Config(output=tmp_path / "run", questions=(tmp_path / name,)))
    assert not (tmp_path / "run").exists()


def test_only_real_takes_a_base_and_needs_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--preset real needs --base"):
        Config(output=tmp_path, preset="real")
    with pytest.raises(UserError, match="trains its own base"):
        Config(output=tmp_path, preset="tiny", base="model")


def test_another_precision_is_that_of_all_trainings_and_stays_with_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--ds_config .*none.json: no such file; the shipped ones are in"):
        Config(output=tmp_path, ds_config=tmp_path / "none.json")
    own = tmp_path / "own.json"
    own.write_text("{}")
    used: list[Preset] = []
    monkeypatch.setattr(quality, "run_preset", lambda preset, config: used.append(preset))
    for given, named in ((own, "own.json"), (ds_configs() / "zero1.json", "ds_configs/zero1.json")):
        config = Config(output=tmp_path, ds_config=given)
        quality.run(config, World())
        plan = make_plan(used[-1], tmp_path, seeds=[0], base=None)
        files = [
            job.words[job.words.index("--ds_config") + 1] for job in plan.jobs if "--ds_config" in job.words
        ]
        assert {*files} == {str(given)}
        assert quality._settings(used[-1], config)["ds_config"] == named


def test_what_only_reads_a_model_has_the_precision_of_the_preset_or_of_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Preset] = []
    monkeypatch.setattr(quality, "run_preset", lambda preset, config: used.append(preset))
    real = Config(output=tmp_path, preset="real", base="model")
    for config, dtype, named in (
        (Config(output=tmp_path), "float32", None),
        (Config(output=tmp_path, dtype="bfloat16"), "bfloat16", "bfloat16"),
        (real, "bfloat16", "bfloat16"),
        (replace(real, dtype="float32"), "float32", "float32"),
    ):
        quality.run(config, World())
        assert quality._settings(used[-1], config).get("dtype") == named
        for job in make_plan(used[-1], tmp_path, seeds=[0], base=config.base).jobs:
            if job.words[0] in ("extract-keys", "fit-gate", "evaluate"):
                assert job.words[job.words.index("--dtype") + 1] == dtype, job.name
