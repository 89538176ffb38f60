"""Question sets through every arm: scores as a plain model gives them, resumable, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.answers import read_answers
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.question_files import Question
from mlpmem_ds.stages.questions import answer_questions
from mlpmem_ds.stages.questions.answer_questions import draw_examples, prompt_with_examples
from mlpmem_ds.stages.questions.answering import Answer
from mlpmem_ds.stages.questions.config import Config
from mlpmem_ds.stages.questions.passages import cut_passages
from mlpmem_ds.stages.questions.results import interval_of_change

from ..conftest import save_export, split_otherwise, write_lines

OPEN = [{"question": f"what is {word}", "answer": [word, "value"]} for word in ("alpha", "beta", "gamma")]
CHOICES = [
    {"query": "alpha", "choices": ["beta", "in range gamma"], "gold": 0},
    {"query": "for", "choices": ["index", "é é", "value"], "gold": 2},
]
LAST = [{"text": "alpha beta gamma"}, {"text": "return value index"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, base_dir: Path, corpus_dir: Path) -> Path:
    """A folder with an export and a plain model, `other`."""
    root = tmp_path_factory.mktemp("questions")
    save_export(root / "export", base_dir, corpus_dir, lmbda=0.35)
    GPT2LMHeadModel.from_pretrained(base_dir).save_pretrained(root / "other")
    AutoTokenizer.from_pretrained(corpus_dir / "tokenizer").save_pretrained(root / "other")
    write_lines(root / "open.dev.jsonl", OPEN)
    write_lines(root / "choices.jsonl", CHOICES)
    write_lines(root / "last.jsonl", LAST)
    return root


def make_config(models: Path, output: Path, **changes: Any) -> Config:
    files = tuple(models / name for name in ("open.dev.jsonl", "choices.jsonl", "last.jsonl"))
    flags = {
        "model": str(models / "export"),
        "questions": files,
        "output": output,
        "control": (f"other={models / 'other'}",),
        "max_new_tokens": 6,
        "unit_questions": 2,
        "bootstrap_samples": 100,
        "dtype": "float32",
    }
    return Config(**flags | changes)


def lines_of(root: Path, name: str) -> list[dict[str, Any]]:
    paths = sorted((root / "answers").glob(f"{name}-*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("answers") / "out"
    table = answer_questions.run(make_config(models, output), World())
    assert table is not None
    return output, table


def test_choices_have_the_log_probabilities_of_a_plain_forward(
    finished: tuple[Path, str], models: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "other")
    model = AutoModelForCausalLM.from_pretrained(models / "other").eval()
    lines = lines_of(finished[0], "choices-base")
    assert [line["question"] for line in lines] == [0, 1]
    for record, line in zip(CHOICES, lines, strict=True):
        expected = []
        for choice in record["choices"]:
            before = tokenizer(record["query"], add_special_tokens=False).input_ids
            ids = tokenizer(f"{record['query']} {choice}", add_special_tokens=False).input_ids
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            after = range(len(before), len(ids))
            expected.append(sum(float(logs[at - 1, ids[at]]) for at in after))
        np.testing.assert_allclose(line["log_probabilities"], expected, atol=1e-4)
        assert line["scores"]["accuracy"] == float(np.argmax(expected) == record["gold"])


def test_a_batch_gives_the_same_answers(finished: tuple[Path, str], models: Path, tmp_path: Path) -> None:
    answer_questions.run(make_config(models, tmp_path, batch=3, unit_questions=3), World())
    for name in ("choices-base", "last-base", "choices-base+memory", "last-other"):
        for one, other in zip(lines_of(tmp_path, name), lines_of(finished[0], name), strict=True):
            assert one["scores"] == other["scores"] and one["question"] == other["question"]
            key = "log_probability" if name.startswith("last") else "log_probabilities"
            np.testing.assert_allclose(one[key], other[key], atol=1e-4)
    for arm in ("base", "base+memory", "other"):
        assert lines_of(tmp_path, f"open-{arm}") == lines_of(finished[0], f"open-{arm}")
    (one, *_), (other, *_) = (
        next(each for each in read_answers(root).sets if each.name == "open").arms
        for root in (tmp_path, finished[0])
    )
    assert one.scores == other.scores and one.tokens_per_second > 0


def test_open_answers_are_those_of_plain_generation(finished: tuple[Path, str], models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "other")
    model = AutoModelForCausalLM.from_pretrained(models / "other").eval()
    for record, line in zip(OPEN, lines_of(finished[0], "open-other"), strict=True):
        ids = tokenizer(
            f"Answer these questions:\n\nQ: {record['question']}?\nA:",
            add_special_tokens=False,
            return_tensors="pt",
        ).input_ids
        made = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=0, pad_token_id=0)
        text = tokenizer.decode(made[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
        assert line["answer"] == text.strip().partition("\n")[0]


def test_the_table_compares_arms_question_by_question(finished: tuple[Path, str]) -> None:
    output, table = finished
    answers = read_answers(output)
    assert list(answers.arms) == ["base", "base+memory", "other"]
    assert {each.name: (each.kind, each.questions) for each in answers.sets} == {
        "open": ("open", 3),
        "choices": ("choice", 2),
        "last": ("last word", 2),
    }
    for each in answers.sets:
        base, memory, other = each.arms
        assert other.scores == base.scores and set(other.changes.values()) == {0.0}  # the same weights
        assert not base.changes and set(memory.changes) == set(base.scores)
        assert (base.tokens_per_second is not None) == (each.kind == "open")
    assert lines_of(output, "choices-base") == lines_of(output, "choices-other")
    assert lines_of(output, "choices-base")[0] != lines_of(output, "choices-base+memory")[0]
    assert "open (3)" in table and "base+memory" in table and "first token" in table
    assert answers.passages is None


def test_a_missing_unit_alone_is_made_again(finished: tuple[Path, str], models: Path, tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "out")
    files = {path.name: path.read_bytes() for path in (tmp_path / "out" / "answers").iterdir()}
    (tmp_path / "out" / "answers" / "open-base-000000.jsonl").unlink()
    (tmp_path / "out" / "manifest.json").unlink()
    assert answer_questions.run(make_config(models, tmp_path / "out"), World()) is not None
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "answers").iterdir()} == files


def test_units_of_two_precisions_do_not_mix(
    finished: tuple[Path, str], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0], tmp_path / "out")
    config = make_config(models, tmp_path / "out", dtype="auto")
    assert answer_questions.run(config, World()) is not None  # which is float32 on this CPU
    monkeypatch.setattr(answer_questions, "resolve_dtype", lambda *_: "bfloat16")
    with pytest.raises(UserError, match="--dtype was 'float32', now 'bfloat16'"):
        answer_questions.run(config, World())


def test_passages_are_put_before_open_questions_alone(models: Path, corpus_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason="passages are found with the optional package bm25s")
    flags: dict[str, Any] = {"control": (), "passages": corpus_dir, "passage_tokens": 8, "num_passages": 3}
    config = make_config(models, tmp_path / "out", lambdas=("0.2", "0.5"), **flags)
    assert answer_questions.run(config, World()) is not None
    answers = read_answers(tmp_path / "out")
    assert list(answers.arms) == ["base", "base+memory_0.2", "base+memory_0.5", "base+rag"]
    arms = {each.name: [row.arm for row in each.arms] for each in answers.sets}
    assert "base+rag" in arms["open"] and "base+rag" not in arms["choices"]
    corpus = open_corpus(corpus_dir)
    assert answers.passages == len(cut_passages(corpus, 8))
    assert answers.index_bytes is not None and answers.index_bytes > corpus.num_bytes
    assert lines_of(tmp_path / "out", "open-base+rag") != lines_of(tmp_path / "out", "open-base")


def test_passages_hold_the_documents_text(corpus_dir: Path) -> None:
    corpus = open_corpus(corpus_dir)
    pieces = cut_passages(corpus, 8)
    whole = cut_passages(corpus, 10**6)
    assert len(whole) == len(corpus.documents) < len(pieces)
    assert "".join("".join(pieces).split()) == "".join("".join(whole).split())


def test_the_first_batch_of_an_arm_is_not_timed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, int]] = []

    def recorded(answerer: Any, prompts: Any, limit: int) -> list[Answer]:
        seconds = 1.0 if any(model is answerer.model for model, _ in asked) else 1000.0
        asked.append((answerer.model, len(prompts)))
        each = {"text": "x", "num_tokens": 2, "is_cut": False}
        return [Answer(first_token_seconds=seconds / 4, seconds=seconds, **each) for _ in prompts]

    monkeypatch.setattr(answer_questions, "answer", recorded)
    files = (models / "open.dev.jsonl",)
    config = make_config(models, tmp_path, questions=files, batch=2, unit_questions=2)
    assert answer_questions.run(config, World()) is not None
    assert [count for _, count in asked] == [2, 2, 1] * 3
    for arm in read_answers(tmp_path).sets[0].arms:
        assert (arm.seconds, arm.first_token_seconds, arm.tokens_per_second) == (3.0, 0.25, 2.0)


def test_examples_are_other_questions() -> None:
    questions = [
        Question(kind="open", prompt=f"Q: {number}?\nA:", answers=(str(number), "x")) for number in range(5)
    ]
    examples = draw_examples("set", [*questions, *questions], 2)
    assert len({example.prompt for example in examples}) == 3
    for question in questions:
        prompt = prompt_with_examples(question, examples, 2)
        assert prompt.startswith("Answer these questions:\n\nQ: ") and prompt.endswith(question.prompt)
        assert prompt.count("Q: ") == 3 and prompt.count(question.prompt) == 1
    with pytest.raises(UserError, match="has 4 besides each"):
        draw_examples("set", questions, 5)


def test_the_interval_is_paired() -> None:
    generator = np.random.default_rng(1)
    base_Q = generator.integers(0, 2, 400).astype(float)
    better_Q = np.maximum(base_Q, generator.random(400) < 0.2)
    low, high = interval_of_change(base_Q, better_Q, 500)
    change = (better_Q - base_Q).mean()
    assert 0 < low < change < high < 2 * change
    assert interval_of_change(base_Q, base_Q, 100) == (0.0, 0.0)


def test_questions_that_are_asked_twice_count_once_in_the_interval() -> None:
    generator = np.random.default_rng(2)
    base_Q, other_Q = generator.random((2, 50))
    twice = interval_of_change(base_Q.repeat(2), other_Q.repeat(2), 300, [f"{n // 2}" for n in range(100)])
    assert twice == pytest.approx(interval_of_change(base_Q, other_Q, 300))
    alone = interval_of_change(base_Q, other_Q, 300, list(range(50)))
    assert alone == interval_of_change(base_Q, other_Q, 300)


def test_records_of_a_group_are_drawn_together(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, score_set = [], answer_questions.score_set

    def recorded(*settings: Any, groups: Any) -> Any:
        drawn.append(groups)
        return score_set(*settings, groups=groups)

    monkeypatch.setattr(answer_questions, "score_set", recorded)
    records = [{**CHOICES[0], **more} for more in ({"group": "1"}, {}, {"group": "1"}, {})]
    files = (write_lines(tmp_path / "pairs.jsonl", records),)
    config = make_config(models, tmp_path / "out", questions=files, control=())
    assert answer_questions.run(config, World()) is not None
    [groups] = drawn
    assert groups[0] == groups[2] and len({*groups}) == 3


def test_what_is_too_long_is_cut_and_counted_or_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model reads 64 tokens; the beginning of a longer prompt is cut off, a choice never."""
    monkeypatch.setattr(answer_questions, "_logger", logging.getLogger("of this test"))
    text = "in range é gamma " * 40
    prompts = [{"query": f"{start}alpha", "choices": ["beta", "é é"], "gold": 1} for start in ("", text)]
    files = (
        write_lines(tmp_path / "asked.jsonl", prompts),
        write_lines(tmp_path / "open.jsonl", [{"question": text, "answer": "x"}]),
    )
    config = make_config(models, tmp_path / "out", questions=files, control=())
    answer_questions.run(config, World())
    found = [
        line.get("cut") for name in ("asked", "open") for line in lines_of(tmp_path / "out", f"{name}-base")
    ]
    assert found == [None, True, True]
    said = "are longer than the model reads: their beginning was cut off"
    assert f"asked-base-000000: 1 of 2 prompts {said}" in caplog.text
    assert f"open-base+memory-000000: 1 of 1 prompts {said}" in caplog.text
    whole, cut = lines_of(tmp_path / "out", "asked-base")
    assert whole["log_probabilities"] != cut["log_probabilities"]
    prompts[1]["choices"] = ["beta", text]
    longer = write_lines(tmp_path / "longer.jsonl", prompts)
    config = make_config(models, tmp_path / "refused", questions=(longer,))
    said = r"--questions longer, question 2, --model: a choice has \d+ tokens, and the model reads 64"
    with pytest.raises(UserError, match=said):
        answer_questions.run(config, World())
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"max_new_tokens": 64},
            "--questions open, --model: answers have up to 64 tokens, and the model reads 64",
        ),
        ({"control": ("base=x",)}, "the name base is taken"),
        ({"control": ("a b=x",)}, "give NAME=DIR"),
        ({"questions": ()}, "nothing to ask"),
        ({"control": ("x=/nowhere/at/all",)}, "--control x .*nowhere"),
        ({"questions": (Path("/nowhere/x.jsonl"),)}, "does not exist"),
        ({"questions": (Path("q/.jsonl"),)}, "q/.jsonl: a set is called by its file's name .*: rename it"),
        ({"lambdas": ("0.5", "0.50000001")}, "--lambdas 0.5 and 0.50000001 are alike in six digits"),
        ({"num_passages": 3}, "--num-passages is of --passages: add that, or leave it out"),
        ({"bootstrap_samples": 10**9}, "--bootstrap-samples must be at least 100 and at most 1000000"),
    ],
)
def test_wrong_inputs_leave_the_disk_untouched(
    models: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        answer_questions.run(make_config(models, tmp_path / "out", **changes), World())
    assert not (tmp_path / "out").exists()


def test_lambdas_need_a_memory(models: Path, tmp_path: Path) -> None:
    config = make_config(models, tmp_path / "out", model=str(models / "other"), lambdas=("0.5",))
    with pytest.raises(UserError, match="--lambdas: --model .* has no memory"):
        answer_questions.run(config, World())


@pytest.mark.parametrize("name", ["export", "other"])
def test_a_run_is_not_continued_with_another_tokenizer(
    name: str, finished: tuple[Path, str], models: Path, tmp_path: Path
) -> None:
    copies = shutil.copytree(models, tmp_path / "models")
    output = shutil.copytree(finished[0], tmp_path / "out")
    answer_questions.run(make_config(copies, output), World())
    split_otherwise(copies / name)
    place = {"export": "model", "other": "control-other"}[name]
    with pytest.raises(UserError, match=f"already holds another run .inputs.tokenizer-{place} was "):
        answer_questions.run(make_config(copies, output), World())
