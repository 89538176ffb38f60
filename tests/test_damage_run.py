"""Some of the trials of damage_run.py, on parts that the suite has made; and what a trial calls used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from . import damage_run
from .damage_run import Outcome, Trials, judged

EXTRACT = "extract-keys --model base --corpus corpus --unit-positions 1024 --codec raw"
READERS = {
    "corpus": [EXTRACT],
    "base": [EXTRACT],
    "keys": ["build-index --keys keys --factory IVF4,PQ4x4 --num-shards 2"],
}
TRIALS = 9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, base_dir: Path, keys_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("damage") / "run"
    for name, path in (("corpus", corpus_dir), ("base", base_dir), ("keys", keys_dir)):
        shutil.copytree(path, root / name)
    return root


def test_damage_is_refused_healed_or_not_read(run: Path, tmp_path: Path) -> None:
    trials = Trials(run, tmp_path, seed=7, readers=READERS)
    done = [trials.trial(number, ["corpus", "keys"]) for number in range(TRIALS)]
    assert [trial for trial in done if trial.end not in ("refused", "same")] == []
    assert sum(trial.end == "refused" for trial in done) >= 2


def test_what_a_trial_calls_used_is_told_from_what_is_refused() -> None:
    path = Path("keys/keys-0.npy")
    whole = Outcome(code=0, said="", files={"a.npy": "1"})
    ends = {
        "same": Outcome(code=0, said="12:00:00 a line", files={"a.npy": "1"}),
        "USED": Outcome(code=0, said="", files={"a.npy": "2"}),
        "refused": Outcome(code=2, said="error: keys-0.npy does not have the checksum", files={}),
        "TRACEBACK": Outcome(code=2, said="error: something else", files={}),
    }
    assert {end: judged(found, whole, path) for end, found in ends.items()} == {end: end for end in ends}
    for code, said in ((1, "error: fault"), (2, "error: /scratch/copy/next cannot be written")):
        assert judged(Outcome(code=code, said=said, files={}), whole, path) == "TRACEBACK"


def test_a_reader_that_fails_without_damage_is_a_failure_of_its_trial(run: Path, tmp_path: Path) -> None:
    trials = Trials(run, tmp_path, seed=7, readers={"corpus": ["extract-keys --no-such-flag 1"]})
    done = trials.trial(0, ["corpus"])
    assert done.end == "BROKEN" and "no-such-flag" in done.said
    assert "| corpus | 1 | 0 | 0 | 0 | 0 | 1 |" in damage_run.table_of([done])


def test_each_kind_of_directory_has_a_reader() -> None:
    made = {line.split()[0] for line in damage_run.PIPELINE.strip().splitlines() if line[0] != " "}
    assert made <= set(damage_run.READERS)
