"""The harness's front-end: what it is given, what is refused, and (where the harness is installed) a whole
run."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines import lm_eval as engine
from mlpmem_ds.engines.lm_eval import Tasks
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.stages.conversion import thresholds
from mlpmem_ds.stages.harness import run_lm_eval
from mlpmem_ds.stages.harness.run_lm_eval import Config, build_tasks

from ...lm_harness import leave_out_its_tasks, needs_harness
from ..conftest import save_export, write_lines

TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "transformers_version"}
ROOT = Path(__file__).parents[3]
QUESTIONS = [
    {"question": "who is alpha", "answer": ["beta", "gamma"]},
    {"question": "what", "answer": "value"},
]
RANKING = [
    {"query": "alpha", "choices": ["beta", "in range gamma"], "gold": 0},
    {"query": "for", "choices": ["index", "é é", "value"], "gold": 2},
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "questions.jsonl", QUESTIONS)


@pytest.fixture
def ranking(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "ranking.jsonl", RANKING)


def test_local_files_become_whole_tasks_and_names_stay_names(
    questions: Path, ranking: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()
    config = Config(model="m", questions=questions, ranking=ranking, tasks=("nq_open",))
    asked, ranked, named = build_tasks(config, folder)
    assert named == "nq_open"
    answers_in_lists = [QUESTIONS[0], {"question": "what", "answer": ["value"]}]
    for task, records in ((asked, answers_in_lists), (ranked, RANKING)):
        assert isinstance(task, dict)
        assert task["dataset_path"] == "json"
        lines = Path(task["dataset_kwargs"]["data_files"]["validation"]).read_text().splitlines()
        assert [json.loads(line) for line in lines] == records
    assert isinstance(asked, dict) and isinstance(ranked, dict)
    assert asked["output_type"] == "generate_until" and asked["metric_list"][0]["metric"] == "exact_match"
    assert ranked["output_type"] == "multiple_choice"
    assert [metric["metric"] for metric in ranked["metric_list"]] == ["acc", "acc_norm"]


def test_each_lambda_is_scored_by_its_own_model(
    export_dir: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen = []
    monkeypatch.setattr(thresholds, "_logger", logging.getLogger("of this test"))

    def load(tasks: Any, **settings: Any) -> Tasks:
        return Tasks(loaded=tuple(tasks), num_fewshot=settings["num_fewshot"], limit=settings["limit"])

    def score(model: MemoryAugmentedLM, encoder: Any, tasks: Tasks, **settings: Any) -> dict[str, Any]:
        assert settings == {"batch_size": 8, "context": 64}
        assert model.generation_config.to_diff_dict().keys() <= TOKENS
        seen.append((model.lmbda, len(encoder.tokenizer), len(tasks.loaded), tasks.limit))
        return {
            "task": {"exact_match,none": model.lmbda / 2, "exact_match_stderr,none": 0.1, "sample_len": 2}
        }

    monkeypatch.setattr(run_lm_eval, "require_harness", lambda: None)
    monkeypatch.setattr(run_lm_eval, "load_tasks", load)
    monkeypatch.setattr(run_lm_eval, "score_tasks", score)
    output = tmp_path / "out.json"
    table = run_lm_eval.run(
        Config(model=str(export_dir), questions=questions, limit=3, output=output), World()
    )
    assert seen == [(0.0, 300, 1, 3), (0.35, 300, 1, 3)]
    assert table.splitlines() == ["task  metric       λ = 0   λ = 0.35", "task  exact_match  0.0000  0.1750"]
    written = json.loads(output.read_text())
    assert [row["lambda"] for row in written["results"]] == [0.0, 0.35]
    assert not caplog.records
    flags: dict[str, Any] = {"lambdas": ("0.9", "0.1"), "base_only_threshold": 0.5}
    run_lm_eval.run(Config(model=str(export_dir), questions=questions, **flags), World())
    assert caplog.text.count("it leaves the memory out everywhere, because its weight is 0.1") == 1
    assert [lmbda for lmbda, *_ in seen[2:]] == [0.9, 0.1]


def test_a_named_lambda_is_meant_without_the_exports_threshold(
    base_dir: Path, corpus_dir: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = save_export(tmp_path / "export", base_dir, corpus_dir, lmbda=0.25, threshold=0.5)
    seen = []

    def score(model: MemoryAugmentedLM, *_: Any, **__: Any) -> dict[str, Any]:
        seen.append((model.lmbda, model.base_only_threshold))
        return {"task": {"acc,none": 0.0}}

    monkeypatch.setattr(run_lm_eval, "require_harness", lambda: None)
    monkeypatch.setattr(run_lm_eval, "load_tasks", lambda *_, **__: None)
    monkeypatch.setattr(run_lm_eval, "score_tasks", score)
    named: dict[str, Any] = {"lambdas": ("0.125",)}
    for flags in ({}, named, named | {"base_only_threshold": 0.75}):
        run_lm_eval.run(Config(model=str(export), questions=questions, **flags), World())
    assert seen == [(0.0, 0.5), (0.25, 0.5), (0.125, None), (0.125, 0.75)]


def test_without_the_harness_the_front_end_names_the_command(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("run_lm_eval_front_end", ROOT / "tools" / "run_lm_eval.py")
    assert spec is not None and spec.loader is not None
    front_end = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(front_end)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        engine.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name)
    )
    words = ["--model", "somewhere", "--questions", str(questions), "--output", str(tmp_path / "out.json")]
    assert front_end.main(words) == 2
    assert 'pip install "lm_eval>=0.4.13,<0.5"' in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("flag", "records", "needle"),
    [
        (
            "questions",
            [QUESTIONS[0], {"question": "q"}],
            "line 2 has no text or list in `answer`: a record of this file has the fields question, answer",
        ),
        ("questions", [{"answer": "a"}], "line 1 has no text in `question`"),
        ("questions", [{"question": "q", "answer": []}], "no text or list in `answer`"),
        ("questions", [], "is empty"),
        ("ranking", [{"query": "q", "choices": ["one"], "gold": 0}], "two or more texts"),
        ("ranking", [RANKING[0], {"query": "q", "choices": ["a", "b"], "gold": 2}], "line 2 has 2 in `gold`"),
        ("ranking", [{"query": "q", "choices": ["a", "b"], "gold": "a"}], "no index"),
        ("ranking", [7], "no text in `query`"),
    ],
)
def test_wrong_lines(flag: str, records: list[Any], needle: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lines.jsonl", records)
    with pytest.raises(UserError, match=needle):
        build_tasks(Config(model="m", **{flag: path}), tmp_path)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question": ')
    (tmp_path / "latin.jsonl").write_bytes(b"caf\xe9")
    for name, needle in (
        ("cut", "line 2 is not JSON"),
        ("latin", "UTF-8"),
        ("missing", "does not exist: give"),
    ):
        with pytest.raises(UserError, match=needle):
            build_tasks(Config(model="m", questions=tmp_path / f"{name}.jsonl"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"questions": None}, "nothing to ask"),
        (
            {"lambdas": ("0.5", "1.5")},
            "--lambdas 1.5: the memory's share of the mixture lies between 0 and",
        ),
        ({"batch_size": 0}, "--batch-size"),
        ({"num_fewshot": -1}, "--num-fewshot"),
        ({"limit": 0}, "--limit"),
        ({"include_path": Path("/nowhere")}, "--include-path /nowhere"),
        ({"output": Path("/nowhere/out.json")}, "does not exist"),
    ],
)
def test_wrong_flags(changes: dict[str, Any], needle: str) -> None:
    with pytest.raises(UserError, match=needle):
        Config(**{"model": "m", "questions": Path("questions.jsonl"), **changes})


@needs_harness
def test_the_harness_itself(
    export_dir: Path, questions: Path, ranking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = run_lm_eval.run(
        Config(model=str(export_dir), questions=questions, ranking=ranking, num_fewshot=1), World()
    )
    rows = [line.split()[:2] for line in table.splitlines()[1:]]
    assert rows == [
        ["local_questions", "exact_match"],
        ["local_ranking", "acc"],
        ["local_ranking", "acc_norm"],
    ]
    leave_out_its_tasks(monkeypatch, tmp_path)
    with pytest.raises(UserError, match="no task no_such_task"):
        run_lm_eval.run(Config(model=str(export_dir), tasks=("no_such_task",)), World())
