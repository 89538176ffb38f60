"""The task files: each is read, its requests are what its prompt says, its scores are the harness's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines import lm_eval as engine
from mlpmem_ds.engines.suite_tasks import MissingDataSetError, Request, SuiteTask, open_task, read_task_file

from ..lm_harness import needs_harness

FOLDER = Path(__file__).parents[2] / "mlpmem_ds" / "stages" / "harness" / "tasks"
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


def opened(name: str, *records: dict[str, Any]) -> SuiteTask:
    return open_task(read_task_file(FOLDER / f"{name}.yaml"), records)


def asked(task: SuiteTask) -> list[tuple[str, str | None]]:
    [document] = task.documents()
    return [(request.context, request.continuation) for request in document.requests]


@needs_harness
@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_all_that_is_needed(name: str) -> None:
    file = read_task_file(FOLDER / f"{name}.yaml")
    assert file.config["task"] == f"mlpmem_{name}" and file.config["dataset_path"]
    assert {"title", "begin_tokens", "tuned_by", "chance"} <= set(file.metadata)
    metrics = [entry["metric"] for entry in file.config["metric_list"]]
    assert file.metadata["tuned_by"] == metrics[0]
    assert all(
        callable(file.config[key]) for key in ("process_docs", "process_results") if key in file.config
    )


@needs_harness
def test_domain_conditional_pmi_asks_after_the_domain() -> None:
    task = opened("sst2", {"text": "dull .", "label": 0})
    assert asked(task) == [
        ("dull . It was", " terrible"),
        ("dull . It was", " great"),
        (" It was", " terrible"),
        (" It was", " great"),
    ]
    [document] = task.documents()
    assert task.num_choices(document) == 2 and task.metrics == ("acc_mutual_info", "acc")
    # log p(y | text) - log p(y | domain): -5 + 9 > -3 + 5, though -5 < -3
    logs = [(-5.0, False), (-3.0, False), (-9.0, False), (-5.0, False)]
    assert task.scores(document, logs) == {"acc_mutual_info": 1.0, "acc": 0.0}


@needs_harness
def test_an_open_question_is_asked_as_published() -> None:
    task = opened("nq_open", {"question": "Who wrote it", "answer": ["A b", "c"]})
    assert asked(task) == [("Answer these questions:\nQuestion: who wrote it?\nAnswer:", None)]
    assert task.generation is not None and task.generation.max_new_tokens == 15
    [document] = task.documents()
    assert document.requests == (Request(context=document.prompt, continuation=None),)
    assert task.scores(document, ["a b, or so"]) == {"exact_match": 1.0, "f1": 1.0, "contains": 1.0}
    short = opened("triviaqa", {"question": "Who?", "answer": ["x"]})
    assert asked(short)[0][0] == "Answer the questions:\n\nQuestion: Who? The answer is:"
    assert short.generation is not None and short.generation.stops == ("\n", ".", ",")


@needs_harness
def test_choices_and_last_words() -> None:
    yes = opened("boolq", {"passage": "p", "question": "is it?", "answer": False})
    assert asked(yes) == [("p\nQuestion: is it?\nAnswer:", choice) for choice in (" yes", " no")]
    bare = opened("strategyqa", {"question": "is it", "answer": True})
    assert asked(bare)[0] == ("Question: is it?\nAnswer:", " yes")
    [document] = yes.documents()
    assert yes.scores(document, [(-2.0, False), (-1.0, True)]) == {"acc": 1.0}
    digits = opened("logiqa", {"query": "42", "choices": ["a", "b"], "gold": 0})
    assert asked(digits) == [("42", " a"), ("42", " b")]
    last = opened("lambada", {"text": 'a "b\nc d'})
    assert asked(last) == [('a "b\nc', " d")] and last.asks_for_greedy
    [document] = last.documents()
    assert last.scores(document, [(-1.0, True)]) == {"acc": 1.0}
    for text in ("hello\nworld", "hello \t world \n"):
        assert asked(opened("lambada", {"text": text})) == [("hello", " world")]
    pair = opened("cb", {"premise": "p", "hypothesis": "h", "label": 2})
    assert asked(pair)[2][1] == " neither" and asked(pair)[3] == (" the answer is:", " true")


@needs_harness
def test_a_label_without_a_choice_is_refused() -> None:
    with pytest.raises(UserError, match="task sst2: item 1 has a label that is none of the task's choices"):
        opened("sst2", {"text": "t", "label": 2})
    with pytest.raises(UserError, match="task sst2: item 2 has a label that is none of the task's choices"):
        opened("sst2", {"text": "t", "label": 1}, {"text": "u", "label": 2}).documents()


@needs_harness
def test_data_that_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(**_: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    said = r"its data set baber/piqa cannot be loaded from the Hub \(no network\): check .*`hf auth login`"
    with pytest.raises(MissingDataSetError, match=said):
        open_task(read_task_file(FOLDER / "piqa.yaml"), None)


@needs_harness
def test_another_release_of_the_harness_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks._yaml_loader", None)
    with pytest.raises(
        UserError, match=r"this release of the lm-evaluation-harness .*: pip install \"lm_eval"
    ):
        read_task_file(FOLDER / "piqa.yaml")


def test_without_the_harness_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        engine.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name)
    )
    with pytest.raises(UserError, match="the lm-evaluation-harness is not installed here: pip install"):
        read_task_file(FOLDER / "piqa.yaml")
