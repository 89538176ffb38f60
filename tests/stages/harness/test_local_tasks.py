"""Files of questions and rankings: read whole and as they stand, or refused with their line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.lm_eval import load_tasks
from mlpmem_ds.engines.tokenizer import open_encoder
from mlpmem_ds.formats.question_files import read_questions
from mlpmem_ds.stages.harness.config import Config
from mlpmem_ds.stages.harness.local_tasks import build_tasks, check_lengths
from mlpmem_ds.stages.questions.answer_questions import prompt_with_examples

from ...lm_harness import needs_harness
from ...toy_tokenizers import KINDS

QUESTION = {
    "question": "who wrote\N{LINE SEPARATOR}it\x85\N{PARAGRAPH SEPARATOR}?",
    "answer": ["é", "2020-01-01"],
}
RANKING = {"query": "42", "choices": ["a", "b\x0c"], "gold": 1}


def written(tmp_path: Path, content: bytes | str) -> Path:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def build(tmp_path: Path, flag: str, content: bytes | str, **more: Any) -> list[dict[str, Any]]:
    """The records that the harness is given."""
    [task] = build_tasks(Config(model="m", **{flag: written(tmp_path, content)}, **more), tmp_path)
    assert isinstance(task, dict)
    text = Path(task["dataset_kwargs"]["data_files"]["validation"]).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def line(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False)


@pytest.mark.parametrize(
    "content",
    [
        f"{line(QUESTION)}\n{line(QUESTION)}".encode(),
        f"\ufeff{line(QUESTION)}\r\n\r\n{line(QUESTION)}\r\n".encode(),
        f"{line(QUESTION)}\n{line(QUESTION)}\n".encode("utf-16"),
        json.dumps([QUESTION, QUESTION], indent=1).encode(),
        (line({**QUESTION, "id": 7, "note": None}) + "\n" + line(QUESTION)).encode(),
        f'{line(QUESTION)[:-1]}, "gold": {"9" * 5000}, "query": 1, "query": 2}}\n{line(QUESTION)}'.encode(),
    ],
)
def test_the_same_questions_in_other_ways(content: bytes, tmp_path: Path) -> None:
    assert build(tmp_path, "questions", content) == [QUESTION, QUESTION]


@pytest.mark.parametrize(
    ("flag", "record", "needle"),
    [
        ("questions", {"question": " ", "answer": "a"}, "line 2 has no text in `question`"),
        ("questions", {"question": 3, "answer": "a"}, "line 2 has no text in `question`"),
        ("questions", {"question": "q", "answer": ["a", ""]}, "line 2 has no text or list in `answer`"),
        ("questions", {"question": "q", "answer": None}, "line 2 has no text or list in `answer`"),
        ("questions", {"question": "q", "answer": {"a": 1}}, "line 2 has no text or list in `answer`"),
        (
            "questions",
            {"question": "\ud800", "answer": "a"},
            r"line 2 has half of a surrogate pair \('\\ud800'\)",
        ),
        ("ranking", {**RANKING, "choices": []}, "line 2 has no list of two or more texts"),
        ("ranking", {**RANKING, "choices": ["a", ""]}, "line 2 has no list of two or more texts"),
        ("ranking", {**RANKING, "choices": "ab"}, "line 2 has no list of two or more texts"),
        ("ranking", {**RANKING, "choices": ["a", "b", "a"]}, "line 2 has the same text twice in `choices`"),
        ("ranking", {**RANKING, "gold": -1}, "line 2 has -1 in `gold`"),
        ("ranking", {**RANKING, "gold": True}, "line 2 has True in `gold`"),
        ("ranking", {**RANKING, "gold": 1.0}, "line 2 has 1.0 in `gold`"),
        (
            "ranking",
            '{"query": "q", "choices": ["a", "b"], "gold": %s}' % ("9" * 5000),
            "line 2 has .* in `gold`",
        ),
        ("ranking", {**RANKING, "query": None}, "line 2 has no text in `query`"),
        ("ranking", [RANKING], "line 2 has no text in `query`"),
    ],
)
def test_a_wrong_record_is_refused_with_its_line(flag: str, record: Any, needle: str, tmp_path: Path) -> None:
    first = QUESTION if flag == "questions" else RANKING
    text = record if isinstance(record, str) else json.dumps(record)
    with pytest.raises(UserError, match=needle):
        build(tmp_path, flag, line(first) + "\n" + text)


def test_a_field_that_stands_twice_is_refused(tmp_path: Path) -> None:
    twice = '{"question": "q", "answer": "a", "answer": "b"}'
    with pytest.raises(UserError, match="line 1 has `answer` twice, with different values"):
        build(tmp_path, "questions", twice)


@needs_harness
@pytest.mark.parametrize("num_fewshot", [0, 1])
def test_questions_are_asked_as_answer_questions_asks_them(num_fewshot: int, tmp_path: Path) -> None:
    texts = ["Who wrote Faust?", "who wrote faust"]
    path = written(tmp_path, "\n".join(line({"question": text, "answer": ["G", "Goethe"]}) for text in texts))
    config = Config(model="m", questions=path, num_fewshot=num_fewshot)
    [task] = load_tasks(build_tasks(config, tmp_path), num_fewshot=num_fewshot).loaded
    task.set_config("num_fewshot", num_fewshot)  # as the harness does with it
    task.set_fewshot_seed(0)
    task.build_all_requests(rank=0, world_size=1)
    asked = [instance.args[0] for instance in task.instances]
    questions = read_questions(path)
    assert asked == [prompt_with_examples(question, questions, num_fewshot) for question in questions]
    assert asked[0].endswith("Q: Who wrote Faust?\nA:") and asked[1].endswith("Q: who wrote faust?\nA:")


def test_what_is_asked_more_than_once_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = {"question": "other", "answer": ["x"]}
    with caplog.at_level(logging.WARNING):
        build(tmp_path, "questions", "\n".join(map(line, [QUESTION, other, QUESTION])))
    assert "asks 1 of its questions more than once: each counts" in caplog.text
    caplog.clear()
    build(tmp_path, "questions", "\n".join(map(line, [QUESTION, other])))
    assert not caplog.records


def test_more_examples_than_other_questions_are_refused(tmp_path: Path) -> None:
    records = [QUESTION, *({"question": f"q{number}", "answer": "a"} for number in range(3)), QUESTION]
    text = "\n".join(map(line, records))
    assert len(build(tmp_path, "questions", text, num_fewshot=3)) == 5
    with pytest.raises(UserError, match=r"--num-fewshot 4: .* has 3 besides each: give --num-fewshot 3"):
        build(tmp_path, "questions", text, num_fewshot=4)


def test_choices_and_answers_fit_the_context(tmp_path: Path) -> None:
    encoder = open_encoder(KINDS["byte_level"](), label="toy")
    records = [RANKING, {"query": "", "choices": ["x", "x" * 40], "gold": 0}]
    tasks = build_tasks(Config(model="m", ranking=written(tmp_path, "\n".join(map(line, records)))), tmp_path)
    check_lengths(tasks, encoder, 41)
    check_lengths(tasks, encoder, None)
    with pytest.raises(
        UserError, match="--ranking: record 2: choice 2 has 41 tokens, and the model reads 40"
    ):
        check_lengths(tasks, encoder, 40)
    tasks = build_tasks(Config(model="m", questions=written(tmp_path, line(QUESTION))), tmp_path)
    check_lengths([*tasks, "nq_open"], encoder, 33)
    with pytest.raises(UserError, match="answer has up to 32 tokens, and the model reads 32"):
        check_lengths(tasks, encoder, 32)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        build_tasks(Config(model="m", questions=tmp_path), tmp_path)
    (tmp_path / "out.json").touch()
    with pytest.raises(UserError, match=r"--output .*out.json exists already: choose another name"):
        Config(model="m", tasks=("nq_open",), output=tmp_path / "out.json")
