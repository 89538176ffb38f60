"""A whole suite with a small export: scores against brute force, resumable, and what is refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from mlpmem_ds.commands import run_lm_eval as front_end
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.lm_eval import encode_pair
from mlpmem_ds.engines.suite_tasks import MissingDataSetError, open_task
from mlpmem_ds.engines.tokenizer import open_encoder
from mlpmem_ds.formats.suites import read_suites
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.stages.harness import readers, run_lm_eval, run_suite
from mlpmem_ds.stages.harness import suites as suites_module
from mlpmem_ds.stages.harness.config import Config
from mlpmem_ds.stages.harness.run_suite import draw
from mlpmem_ds.stages.harness.suites import SUITES, TASKS_FOLDER, open_suites

from ...lm_harness import needs_harness
from ..conftest import write_lines
from .conftest import local_files

LAMBDAS = (0.0, 0.4, 1.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    local_files(folder)
    return folder


def make_config(export_dir: Path, data: Path, output: Path, **changes: Any) -> Config:
    flags: dict[str, Any] = {
        "model": str(export_dir),
        "suite": ("paper",),
        "data": data,
        "output": output,
        "lambdas": ("0.4",),
        "generation_lambdas": ("0.4",),
        "control": (f"other={export_dir.parent / 'other'}",),
        "max_new_tokens": 4,
        "bootstrap_samples": 100,
        "dtype": "float32",
    }
    return Config(**flags | changes)


@pytest.fixture(scope="module")
def finished(
    export_dir: Path, base_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    GPT2LMHeadModel.from_pretrained(base_dir).save_pretrained(export_dir.parent / "other")
    AutoTokenizer.from_pretrained(export_dir).save_pretrained(export_dir.parent / "other")
    output = tmp_path_factory.mktemp("suite") / "out"
    page = run_lm_eval.run(make_config(export_dir, data, output), World())
    assert page is not None
    return output, page


def lines_of(output: Path, name: str) -> list[dict[str, Any]]:
    text = (output / "scores" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


class Brute:
    """Log-probabilities in float64, by a plain forward of each text at each λ."""

    def __init__(self, export_dir: Path) -> None:
        self.model = MemoryAugmentedLM.from_pretrained(export_dir).eval()
        self.encoder = open_encoder(AutoTokenizer.from_pretrained(export_dir), label="toy")

    def logs(self, context: str, text: str, lmbda: float) -> tuple[float, bool]:
        before, after = encode_pair(self.encoder, context, text)
        self.model.lmbda = lmbda
        with torch.no_grad():
            logits = self.model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        logs_TV, ids_T = logits.double().log_softmax(-1), torch.tensor(after)
        greedy = bool((logs_TV.argmax(-1) == ids_T).all())
        return float(logs_TV.gather(1, ids_T[:, None]).sum()), greedy


@needs_harness
def test_domain_conditional_pmi_is_that_of_brute_force(
    finished: tuple[Path, str], export_dir: Path, data: Path
) -> None:
    brute = Brute(export_dir)
    records = local_files(data)["sst2"]
    lines = lines_of(finished[0], "sst2-joint")
    assert len(lines) == len(records)
    for line in lines:
        record = records[line["document"]]
        for place, lmbda in enumerate(LAMBDAS):
            logs = np.array(
                [
                    [brute.logs(context, word, lmbda)[0] for word in (" terrible", " great")]
                    for context in (f"{record['text']} It was", " It was")
                ]
            )
            pmi = logs[0] - logs[1]  # log p(y | text, domain) - log p(y | domain)
            if abs(pmi[0] - pmi[1]) > 1e-4:
                expected = float(np.argmax(pmi) == record["label"])
                assert line["scores"]["acc_mutual_info"][place] == expected
            assert line["scores"]["acc"][place] == float(np.argmax(logs[0]) == record["label"])


@needs_harness
def test_choices_last_words_and_truthfulness_are_those_of_brute_force(
    finished: tuple[Path, str], export_dir: Path, data: Path
) -> None:
    brute, records = Brute(export_dir), local_files(data)
    for line in lines_of(finished[0], "piqa-joint"):
        record = records["piqa"][line["document"]]
        prompt = f"Question: {record['query']}\nAnswer:"
        for place, lmbda in enumerate(LAMBDAS):
            logs = [brute.logs(prompt, f" {choice}", lmbda)[0] for choice in record["choices"]]
            assert line["scores"]["acc"][place] == float(np.argmax(logs) == 1)
            sizes = [len(choice.encode()) for choice in record["choices"]]
            assert line["scores"]["acc_bytes"][place] == float(np.argmax(np.divide(logs, sizes)) == 1)
    for line in lines_of(finished[0], "lambada-joint"):
        before, _, word = records["lambada"][line["document"]]["text"].rpartition(" ")
        expected = [float(brute.logs(before, f" {word}", lmbda)[1]) for lmbda in LAMBDAS]
        assert line["scores"]["acc"] == expected and line["chance"] == {}
    assert all(0 < each["scores"]["mc2"][1] < 1 for each in lines_of(finished[0], "truthfulqa_mc-joint"))


@needs_harness
def test_a_control_of_the_same_weights_scores_as_the_base(finished: tuple[Path, str]) -> None:
    suites = read_suites(finished[0])
    for task in suites.tasks:
        for metric in task.metrics:
            arms = {arm.arm: arm for arm in metric.arms}
            assert list(arms) == ["base", "base+memory", "memory_alone", "other"]
            assert arms["other"].change == pytest.approx(0.0, abs=1e-5) and arms["base"].lmbda == 0.0
            assert arms["base+memory"].lmbda == task.lmbda and arms["memory_alone"].lmbda == 1.0
    [open_task] = [task for task in suites.tasks if task.name == "nq_open"]
    assert [speed.arm for speed in open_task.speeds] == ["base", "base+memory", "memory_alone", "other"]
    assert all(speed.tokens_per_second > 0 for speed in open_task.speeds)
    lines = lines_of(finished[0], "nq_open-joint")
    assert [line["answers"][0] for line in lines] == [
        line["answers"][0] for line in lines_of(finished[0], "nq_open-other")
    ]
    assert all(len(line["answers"]) == 3 for line in lines)


@needs_harness
def test_the_table_names_what_was_left_out(finished: tuple[Path, str], data: Path) -> None:
    output, page = finished
    suites = read_suites(output)
    names = [task.name for task in suites.tasks]
    assert sorted(names) == sorted(local_files(data))
    assert {*names, *suites.left_out} == {*SUITES["paper"]}
    assert suites.left_out["yahoo"] == f"--data {data} has no yahoo.jsonl"
    assert (output / "suites.md").read_text(encoding="utf-8") == page
    assert "- yahoo: --data" in page and "| SST-2 | accuracy, DCPMI |" in page
    for task in suites.tasks:
        halves = [line["half"] for line in lines_of(output, f"{task.name}-joint")]
        assert (task.tuning, task.reported) == (halves.count("tuning"), halves.count("reported"))
        assert 0 <= task.reported - task.tuning <= 1


@needs_harness
def test_a_missing_task_alone_is_scored_again(
    finished: tuple[Path, str], export_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    files = {path.name: path.read_bytes() for path in (output / "scores").iterdir()}
    times = {name: (output / "scores" / name).stat().st_mtime_ns for name in files}
    (output / "scores" / "piqa-joint.jsonl").unlink()
    (output / "manifest.json").unlink()
    assert run_lm_eval.run(make_config(export_dir, data, output, dtype="auto"), World()) is not None
    assert {path.name: path.read_bytes() for path in (output / "scores").iterdir()} == files
    again = {name for name in files if (output / "scores" / name).stat().st_mtime_ns != times[name]}
    assert again == {"piqa-joint.jsonl"}
    with pytest.raises(UserError, match="lambdas"):
        run_lm_eval.run(make_config(export_dir, data, output, lambdas=("0.7",)), World())
    monkeypatch.setattr(run_suite, "resolve_dtype", lambda *_: "bfloat16")
    with pytest.raises(UserError, match="--dtype was 'float32', now 'bfloat16'"):
        run_lm_eval.run(make_config(export_dir, data, output, dtype="auto"), World())


@needs_harness
def test_passages_stand_before_open_questions_alone(
    export_dir: Path, corpus_dir: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bm25s", reason="passages are found with the optional package bm25s")
    for name in ("nq_open", "piqa"):
        shutil.copy(data / f"{name}.dev.jsonl", tmp_path / f"{name}.jsonl")
    flags: dict[str, Any] = {"passages": corpus_dir, "passage_tokens": 8, "control": (), "limit": 4}
    config = make_config(export_dir, tmp_path, tmp_path / "out", **flags)
    assert run_lm_eval.run(config, World()) is not None
    arms = {task.name: [arm.arm for arm in task.metrics[0].arms] for task in read_suites(config.output).tasks}
    assert arms == {
        "nq_open": ["base", "base+memory", "memory_alone", "base+rag"],
        "piqa": ["base", "base+memory", "memory_alone"],
    }
    assert len(lines_of(tmp_path / "out", "nq_open-base+rag")) == 4


@needs_harness
def test_a_model_without_a_memory_is_the_base_alone(
    finished: tuple[Path, str], export_dir: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copy(data / "cb.dev.jsonl", tmp_path / "cb.jsonl")
    plain = {"model": str(export_dir.parent / "other"), "lambdas": (), "generation_lambdas": ()}
    config = make_config(export_dir, tmp_path, tmp_path / "out", control=(), suite=("nine",), **plain)
    page = run_lm_eval.run(config, World())
    [task] = read_suites(tmp_path / "out").tasks
    assert task.lmbda is None and page is not None and "λ" not in page.split("## Arms")[0]
    with pytest.raises(UserError, match="--lambdas: --model .* has no memory"):
        run_lm_eval.run(
            make_config(export_dir, tmp_path, tmp_path / "x", **plain | {"lambdas": ("0.5",)}), World()
        )


@needs_harness
@pytest.mark.parametrize(
    ("name", "record", "said"),
    [
        ("nq_open", {"question": "q", "answer": True}, "line 1 has no text or list in `answer`"),
        ("boolq", {"question": "q", "answer": "yes"}, "record 1 has no true or false in `answer`"),
        ("sst2", {"text": "t"}, "has no list of two or more texts in `labels`"),
        ("cb", {"premise": "p", "hypothesis": "h", "label": 1}, "has none of entailment"),
        (
            "cb",
            {"premise": "p", "hypothesis": "h", "label": "not_entailment"},
            "and task cb asks for entailment",
        ),
        ("rte", {"premise": "p", "hypothesis": "h", "label": "neutral"}, "and task rte asks for entailment"),
        (
            "sst2",
            {"text": "t", "label": 0, "labels": ["bad", "good"]},
            "record 1 has the labels bad, good, and task sst2 asks for negative, positive",
        ),
        (
            "sst2",
            {"text": "t", "label": 0, "labels": ["negative", "x", "positive"]},
            "has the labels negative, x",
        ),
        ("halueval_qa", {"query": "q", "choices": ["Yes", "No"], "gold": 0}, "record 1 has no `group`"),
        (
            "truthfulqa_mc",
            {"question": "q", "mc1_targets": {"x": 1, "y": 0}, "mc2_targets": {"x": 0, "y": 0}},
            "line 1 has no texts in `mc2_targets` with 1 or 0, at least one with 1",
        ),
    ],
)
def test_a_file_of_another_layout_is_refused(
    name: str, record: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_lines(tmp_path / f"{name}.jsonl", [record])
    with pytest.raises(UserError, match=said):
        open_suites(("paper",), tmp_path)


@needs_harness
@pytest.mark.parametrize(
    ("name", "labels", "places"),
    [
        ("sst2", ["positive", "Negative"], [1, 0]),
        ("agn", ["sports", "world", "technology", "business"], [1, 0, 3, 2]),
        ("agn", ["world", "sports", "business", "science"], [0, 1, 2, 3]),
    ],
)
def test_a_label_is_known_by_its_name(
    name: str, labels: list[str], places: list[int], tmp_path: Path
) -> None:
    records = [{"text": "t", "label": number, "labels": labels} for number in range(len(labels))]
    write_lines(tmp_path / f"{name}.jsonl", records)
    [task] = open_suites(("nine",), tmp_path).tasks
    assert [document.record["label"] for document in task.documents()] == places


@needs_harness
def test_what_the_hub_does_not_give_is_left_out(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_or_refuse(file: Any, records: Any) -> Any:
        if file.name != "cb":
            raise MissingDataSetError("no such set")
        return open_task(file, [{"premise": "p", "hypothesis": "h", "label": 0}])

    monkeypatch.setattr(suites_module, "open_task", open_or_refuse)
    chosen = open_suites(("nine",), None)
    assert [task.name for task in chosen.tasks] == ["cb"] and len(chosen.left_out) == 8
    assert chosen.left_out["rte"] == "no such set"
    with pytest.raises(
        UserError, match="no task of --suite can be had; arc_easy: no such set; or give --data"
    ):
        open_suites(("at-scale",), None)


@needs_harness
def test_long_answers_are_refused_before_anything_is_written(
    export_dir: Path, data: Path, tmp_path: Path
) -> None:
    config = make_config(export_dir, data, tmp_path / "out", control=(), max_new_tokens=100_000)
    with pytest.raises(UserError, match="task nq_open, --model: answers have up to 100,000 tokens, and the"):
        run_lm_eval.run(config, World())
    assert not (tmp_path / "out").exists()


@needs_harness
@pytest.mark.parametrize("changes", [{"model": "/nowhere/at/all"}, {"control": ("x=/nowhere/at/all",)}])
def test_models_are_looked_for_before_prompts_are_made(
    changes: dict[str, Any], export_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_suite, "draw", lambda *_: pytest.fail("prompts are made"))
    [flag] = changes
    plain: dict[str, Any] = {"control": (), "lambdas": (), "generation_lambdas": ()}
    config = make_config(export_dir, data, tmp_path / "out", **plain | changes)
    with pytest.raises(UserError, match=f"--{flag} .*/nowhere/at/all: there is no such directory"):
        run_lm_eval.run(config, World())


@needs_harness
def test_a_number_is_meant_without_the_threshold_and_no_first_batch_is_timed(
    export_dir: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(readers, "_logger", logging.getLogger("of this test"))
    shutil.copy(data / "nq_open.dev.jsonl", tmp_path / "nq_open.jsonl")
    asked, answer = [], run_suite.answer

    def recorded(answerer: Any, prompts: Any, limit: int, **more: Any) -> Any:
        asked.append((answerer.model.lmbda, answerer.model.base_only_threshold, len(prompts), limit))
        return answer(answerer, prompts, limit, **more)

    monkeypatch.setattr(run_suite, "answer", recorded)
    flags: dict[str, Any] = {"control": (), "base_only_threshold": 0.9, "batch_size": 4}
    assert run_lm_eval.run(make_config(export_dir, tmp_path, tmp_path / "out", **flags), World()) is not None
    assert caplog.text.count("--base-only-threshold 0.9 changes nothing: there is no gate (--gate)") == 1
    assert asked == [(lmbda, None, *call) for lmbda in (0.0, 0.4, 1.0) for call in ((4, 2), (4, 4), (2, 4))]


@needs_harness
def test_both_answers_to_a_question_of_halueval_stand_in_one_half(tmp_path: Path) -> None:
    records = [
        {
            "query": f"Question: {number}\nAnswer: {answer}",
            "choices": ["Yes", "No"],
            "gold": 0,
            "group": f"{number}",
        }
        for number in range(40)
        for answer in ("r", "h")
    ]
    write_lines(tmp_path / "halueval_qa.jsonl", records)
    [task] = open_suites(("paper",), tmp_path).tasks
    halves = draw(task, None).halves
    assert {number ^ 1 for number in halves.tuning} == {*halves.tuning} and len(halves.tuning) == 40


@needs_harness
def test_files_are_found_by_their_first_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has none of the files of --suite nine: give a directory with sst2"):
        open_suites(("nine",), tmp_path)
    for name in ("cb.jsonl", "cb.dev.jsonl"):
        write_lines(tmp_path / name, [{"premise": "p", "hypothesis": "h", "label": "neutral"}])
    with pytest.raises(UserError, match="has several files of cb: cb.dev.jsonl, cb.jsonl; leave one there"):
        open_suites(("nine",), tmp_path)
    (tmp_path / "cb.jsonl").unlink()
    write_lines(tmp_path / "winogrande.jsonl", [{}])
    chosen = open_suites(("nine", "at-scale"), tmp_path)
    assert [task.name for task in chosen.tasks] == ["cb"]
    assert chosen.left_out["winogrande"] == "it is read from the Hub alone"


@needs_harness
@pytest.mark.shared_data
def test_the_shared_sets_are_tasks_of_the_paper(tmp_path: Path) -> None:
    folder = Path(__file__).resolve().parents[4] / "shared" / "data" / "qa"
    if not folder.is_dir():
        pytest.skip("the shared question sets are absent")
    for path in folder.glob("*.jsonl"):
        lines = path.read_text(encoding="utf-8").split("\n")[:12]
        (tmp_path / path.name).write_text("\n".join(lines), encoding="utf-8")
    chosen = open_suites(("paper",), tmp_path)
    assert set(chosen.left_out) == {"logiqa", "yahoo", *(name for name in SUITES["paper"] if "halu" in name)}
    for task in chosen.tasks:
        documents = task.documents()
        assert len(documents) == 12 and all(document.prompt for document in documents)


def test_every_task_of_a_suite_has_a_file() -> None:
    names = {name for tasks in SUITES.values() for name in tasks}
    assert names == {path.stem for path in TASKS_FOLDER.glob("[!_]*.yaml")}
    assert len(SUITES["nine"]) == 9 and len(set(SUITES["at-scale"])) == 17 + 2  # HaluEval is three


def test_the_page_names_every_file_with_those_of_its_layout() -> None:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in TASKS_FOLDER.glob("[!_]*.yaml")}
    layouts = {name: found[1] for name, text in texts.items() if (found := re.search("layout: (.+)", text))}
    page = (Path(__file__).parents[3] / "docs" / "suites.md").read_text(encoding="utf-8")
    table = page.partition("| `NAME` | fields")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines()[2:]]
    assert sorted(name for row in rows for name in row) == sorted(layouts)
    assert all(len({layouts[name] for name in row}) == 1 for row in rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "papers"], "invalid choice: 'papers'"),
        (["--suite", "paper"], "--suite writes a directory: give --output DIR"),
        (
            ["--suite", "paper", "--output", "OUT", "--data", "/nowhere/at/all"],
            "is not a directory: give one",
        ),
        (["--suite", "paper", "--output", __file__], "is a file: choose a directory"),
        (["--suite", "paper", "--output", "OUT", "--tasks", "piqa"], "--tasks does not go with --suite"),
        (["--tasks", "piqa", "--data", "/tmp"], "--data is of --suite: add that, or leave it out"),
        (["--tasks", "piqa", "--bootstrap-samples", "900"], "--bootstrap-samples is of --suite: add that"),
        (["--tasks", "piqa", "--passage-tokens", "9"], "--passage-tokens is of --passages: add that"),
        (
            ["--suite", "paper", "--output", "OUT", "--generation-lambdas", "2"],
            "--generation-lambdas 2: the memory",
        ),
        (
            ["--suite", "paper", "--output", "OUT", "--lambdas", "0.5", "0.9999999"],
            "--lambdas 1.0 and 0.9999999 are alike in six digits",
        ),
        (["--suite", "paper", "--output", "OUT", "--control", "base=x"], "the name base is taken"),
        (["--suite", "paper", "--output", "OUT", "--control", "joint=x"], "joint=…: the name is taken"),
    ],
)
def test_wrong_flags_are_exit_code_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "m", *(str(tmp_path / "out") if word == "OUT" else word for word in words)]
    try:
        code = front_end(words, prog="run_lm_eval.py")
    except SystemExit as error:
        code = int(str(error.code))
    assert code == 2 and said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
