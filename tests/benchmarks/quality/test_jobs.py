"""The runner of jobs, with a child that leaves what a stage leaves: order, resumption, budgets, failures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.quality.jobs import Job, JobRunner
from mlpmem_ds.core.errors import UserError

# Notes its start; with --fail it ends as a front-end that refuses, until the file `mended` is there.
CHILD = """
import json, pathlib, sys
root = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
top = root.parent
with open(top / "starts", "a") as stream:
    stream.write(root.name + "\\n")
if "--fail" in sys.argv and not (top / "mended").exists():
    print("error: no such text")
    sys.exit(2)
root.mkdir(parents=True, exist_ok=True)
events = [{"time": 0, "rank": 0, "event": "started"}, {"time": 20, "rank": 0, "event": "done"}]
(root / "log.jsonl").write_text("".join(json.dumps(event) + "\\n" for event in events))
(root / "manifest.json").write_text(json.dumps({"format": "mlpmem-memory"}))
"""


class Script:
    """A child that runs CHILD."""

    def __init__(self, words: Sequence[str], log: Path, threads: int) -> None:
        with open(log, "ab") as stream:
            self._process = subprocess.Popen([sys.executable, "-c", CHILD, *words], stdout=stream)

    def poll(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, seconds: float) -> bool:
        self._process.wait(seconds)
        return True


@pytest.fixture
def runner(tmp_path: Path) -> JobRunner:
    return JobRunner(root=tmp_path, at_once=2, cores=2, launch=Script)


def _starts(runner: JobRunner) -> list[str]:
    return (runner.root / "starts").read_text().split()


def test_a_job_starts_after_those_that_it_needs(runner: JobRunner) -> None:
    runner.run(
        [
            Job(name="last", words=("evaluate",), needs=("first", "second")),
            Job(name="first", words=("train",)),
            Job(name="second", words=("train",), needs=("first",)),
        ]
    )
    assert _starts(runner) == ["first", "second", "last"]


def test_what_is_complete_is_not_started_again_and_other_flags_are(runner: JobRunner) -> None:
    plan = [Job(name="one", words=("train", "--seed", "0")), Job(name="two", words=("train",))]
    runner.run(plan)
    runner.run(plan)
    assert sorted(_starts(runner)) == ["one", "two"]
    assert runner.seconds(plan[0]) == 20
    runner.run([Job(name="one", words=("train", "--seed", "1"))])
    assert _starts(runner).count("one") == 2


def test_a_job_that_is_not_complete_is_started_again(runner: JobRunner) -> None:
    plan = [Job(name="one", words=("train",))]
    runner.run(plan)
    (runner.root / "one" / "manifest.json").unlink()
    runner.run(plan)
    assert _starts(runner) == ["one", "one"]


def test_a_job_whose_input_was_replaced_is_started_again(runner: JobRunner) -> None:
    plan = [Job(name="one", words=("train",)), Job(name="two", words=("train",), needs=("one",))]
    runner.run(plan)
    (runner.root / "one" / "manifest.json").write_text('{"format": "mlpmem-memory", "seed": 1}')
    assert runner.seconds(plan[1]) is None
    runner.run(plan)
    assert _starts(runner) == ["one", "two", "two"]
    runner.run(plan)
    assert len(_starts(runner)) == 3


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (("train", "--ds_config", "{texts}/a.txt"), "a.txt"),
        (("prepare-corpus", "--input", "docs:python", "{texts}"), "folder/b.txt"),
        (("prepare-corpus", "--input", "{texts}/*.txt", "--exclude", "b*"), "new.txt"),
        (("evaluate", "--model", "{texts}/base", "--samples", "0"), "base/manifest.json"),
    ],
    ids=["file", "directory", "pattern", "output of another plan"],
)
def test_a_job_is_started_again_where_what_its_flags_name_changed(
    tmp_path_factory: pytest.TempPathFactory, runner: JobRunner, words: Sequence[str], change: str
) -> None:
    texts = tmp_path_factory.mktemp("texts")
    for name in ("a.txt", "folder/b.txt", "base/manifest.json"):
        (texts / name).parent.mkdir(exist_ok=True)
        (texts / name).write_text('{"format": "mlpmem-base"}')
    job = Job(name="one", words=tuple(word.format(texts=texts) for word in words))
    runner.run([job])
    assert runner.seconds(job) == 20
    (texts / change).write_text("another text")
    assert runner.seconds(job) is None


def test_what_a_corpus_does_not_read_changes_no_job(
    tmp_path_factory: pytest.TempPathFactory, runner: JobRunner
) -> None:
    """As caches and packages in the folder of Python's own library."""
    text = tmp_path_factory.mktemp("text")
    (text / "a.py").write_text("a = 1")
    flags = ("--include", "*.py", "--exclude", "site-packages")
    job = Job(name="one", words=("prepare-corpus", "--input", str(text), *flags))
    runner.run([job])
    for name in ("__pycache__/a.pyc", "site-packages/b.py", "notes.txt"):
        (text / name).parent.mkdir(exist_ok=True)
        (text / name).write_text("b")
    (text / "gone.txt").symlink_to(text / "no such file")
    assert runner.seconds(job) == 20
    (text / "a.py").unlink()
    assert runner.seconds(job) is None and runner.recorded_seconds(job) == 20


def test_a_record_without_inputs_stays_valid(runner: JobRunner) -> None:
    plan = [Job(name="one", words=("train",)), Job(name="two", words=("train",), needs=("one",))]
    runner.run(plan)
    path = runner.root / "jobs" / "two.json"
    record = json.loads(path.read_text())
    del record["inputs"]
    path.write_text(json.dumps(record))
    assert runner.seconds(plan[1]) == 20


def test_a_failure_names_the_job_and_its_log_and_the_rest_is_continued(runner: JobRunner) -> None:
    plan = [
        Job(name="one", words=("train",)),
        Job(name="two", words=("train", "--fail"), needs=("one",)),
        Job(name="three", words=("evaluate",), needs=("two",)),
    ]
    with pytest.raises(UserError, match=r"train for two ended with exit code 2 \(error: no such text\)"):
        runner.run(plan)
    assert "no such text" in (runner.root / "logs" / "two.log").read_text()
    (runner.root / "mended").touch()
    runner.run(plan)
    assert _starts(runner) == ["one", "two", "two", "three"]


def test_a_budget_is_what_other_jobs_took_together(runner: JobRunner) -> None:
    runner.run(
        [
            Job(name="keys", words=("extract-keys",)),
            Job(name="memory", words=("train",)),
            Job(name="equal", words=("train-base",), needs=("keys", "memory"), budget_of=("keys", "memory")),
        ]
    )
    record = json.loads((runner.root / "jobs" / "equal.json").read_text())
    assert record["words"][-2:] == ["--time-budget-seconds", "40"]
