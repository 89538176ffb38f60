#!/usr/bin/env python3
"""Damage a finished run in many ways, one at a time, and look at what its next stage makes of it.

    python tests/damage_run.py --trials 300 --seed 7

Makes a small run with every kind of directory, then in each trial flips a bit of one file, cuts the file
short or removes it, and starts the command that reads this directory next (for a checkpoint: the training).
It must end in one of three ways: it refuses with exit code 2 and one line that names the file or its
directory; it gives what an undamaged run gives, because the file is healed or not read; nothing else. A
command that fails on the undamaged run shows nothing: its trial is BROKEN. Each trial has the seed of its
number, so that one can be repeated: --only 17.

Prints a table, and a line for each trial that ended otherwise; exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OPERATIONS = ("flip", "truncate", "delete")
ENDS = ("refused", "same", "USED", "TRACEBACK", "BROKEN")
NOT_OF_THE_RESULT = ("run.json", "log.jsonl", "manifest.json", "metrics.jsonl", "report.md", "ds_config.json")
TIMES = re.compile(r'"(?:[a-z_]*seconds[a-z_]*|date|time|[a-z_]*per_second|platform)": ?[^,}\n]*')
_BYTES_OF_TEXT = 60_000

# One command a line: the directory that it writes, the command, its flags; paths lie in the run's directory.
PIPELINE = """
corpus prepare-corpus --input text --tokenizer train:300 --processes 1 --block-size 64 --stride 32
    --tuning-fraction .2 --test-fraction .2
base train-base --ds-config {cpu} --corpus corpus --num-layers 1 --hidden-size 32 --num-heads 2
    --batch-tokens 2048 --steps 3
keys extract-keys --model base --corpus corpus --unit-positions 4096 --codec int8
index build-index --keys keys --factory IVF8,PQ8x8 --num-shards 2
targets write-targets --keys keys --index index --search ivf --nprobe 8 --k 16 --temperature 20
    --shard-positions 4096
memory train --ds-config {cpu} --corpus corpus --keys keys --targets targets --model base --num-blocks 1
    --batch-positions 512 --epochs 1 --save-every-steps 8 --validate-every none --ce-through mixture
baseline train-baseline --ds-config {cpu} --corpus corpus --model base --kind continued
    --batch-tokens 2048 --epochs 0.5 --validate-every none --early-stopping-patience none --select last
gate fit-gate --model base --memory memory --corpus corpus --max-epochs 2 --min-positions 64
report evaluate --model base --corpus corpus --keys keys --index index --targets targets --memory memory
    --control baseline=baseline --gate gate --speed-positions none --samples 0 --bootstrap-samples 100
export convert-checkpoint --checkpoint memory --model base --report report
answers answer-questions --model export --questions questions.jsonl --max-new-tokens 4
    --bootstrap-samples 100
"""
# The directory that is damaged → the command that reads it next, writing `next`.
READERS = {
    "corpus": ["extract-keys --model base --corpus corpus --unit-positions 4096 --codec int8"],
    "base": ["extract-keys --model base --corpus corpus --unit-positions 4096 --codec raw"],
    "keys": [
        "write-targets --keys keys --index index --search ivf --nprobe 8 --k 16 --temperature 20"
        " --shard-positions 4096",
        "train --ds-config {cpu} --corpus corpus --keys keys --targets targets --model base --num-blocks 1"
        " --batch-positions 2048 --epochs 0.5 --validate-every none --ce-through mixture",
        "export-datastore --keys keys --targets targets",
    ],
    "index": [
        "write-targets --keys keys --index index --search ivf --nprobe 8 --k 16 --temperature 20"
        " --shard-positions 4096",
    ],
    "targets": [
        "train --ds-config {cpu} --corpus corpus --keys keys --targets targets --model base --num-blocks 1"
        " --batch-positions 2048 --epochs 0.5 --validate-every none",
    ],
    "memory": [
        "convert-checkpoint --checkpoint memory --model base --report report",
        "evaluate --model base --corpus corpus --memory memory --speed-positions none --samples 0"
        " --bootstrap-samples 100",
    ],
    "gate": ["convert-checkpoint --checkpoint memory --model base --gate gate"],
    "baseline": [
        "evaluate --model base --corpus corpus --control baseline=baseline --speed-positions none --samples 0"
        " --bootstrap-samples 100",
    ],
    "report": ["convert-checkpoint --checkpoint memory --model base --report report"],
    "export": [
        "generate --model export --prompt return --max-new-tokens 8",
        "answer-questions --model export --questions questions.jsonl --max-new-tokens 4"
        " --bootstrap-samples 100",
    ],
    "answers": [
        "answer-questions --model export --questions questions.jsonl --max-new-tokens 4"
        " --bootstrap-samples 100"
    ],
    "checkpoints": [
        "train --ds-config {cpu} --corpus corpus --keys keys --targets targets --model base --num-blocks 1"
        " --batch-positions 512 --epochs 1 --save-every-steps 8 --validate-every none --ce-through mixture"
    ],
}
CONTINUED = {"answers": "answers", "checkpoints": "memory"}  # what the next command writes again


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, what it said, and what it left, by name."""

    code: int
    said: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class Trial:
    """One damage and its end."""

    number: int
    kind: str
    operation: str
    file: str
    command: str
    end: str
    said: str


def run_command(words: list[str], output: Path | None) -> tuple[int, str]:
    """A command in this process, as its front-end runs it: exit code, and standard error and output."""
    from mlpmem_ds.commands import COMMANDS

    name, *flags = words
    said = io.StringIO()
    if output is not None:
        flags += ["--output", str(output)]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = COMMANDS[name](flags, prog=name)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, said.getvalue()


def make_run(root: Path) -> None:
    """Every kind of directory, below `root`, or what is missing there; goes into that directory."""
    (root / "text").mkdir(parents=True, exist_ok=True)
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if size + path.stat().st_size < _BYTES_OF_TEXT:
            size += path.stat().st_size
            shutil.copyfile(path, root / "text" / path.name)
    questions = [{"question": "what is it", "answer": ["value"]}, {"question": "who", "answer": ["self"]}]
    (root / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    os.chdir(root)
    for line in PIPELINE.strip().replace("\n ", " ").splitlines():
        name, *words = line.replace("{cpu}", str(ROOT / "ds_configs" / "cpu.json")).split()
        code, said = run_command(words, root / name)
        if code:
            raise SystemExit(f"{name}: exit code {code}\n{said}")


def files_of(kind: str, root: Path) -> list[Path]:
    """What may be damaged of a kind of directory."""
    folder = root / "memory" / "checkpoints" if kind == "checkpoints" else root / kind
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in inside if kind != "memory" or "checkpoints" not in path.parts]


def damage(path: Path, operation: str, generator: random.Random) -> None:
    """Change a file in place."""
    content = bytearray(path.read_bytes())
    if operation == "delete":
        path.unlink()
        return
    if operation == "flip" and content:
        place = generator.randrange(len(content))
        content[place] ^= 1 << generator.randrange(8)
    elif operation == "truncate":
        del content[generator.randrange(len(content)) if content else 0 :]
    path.write_bytes(content)


@contextlib.contextmanager
def copied(run: Path, scratch: Path) -> Iterator[Path]:
    """A copy of the run, which is the working directory meanwhile; taken away afterwards."""
    place = scratch / "copy"
    shutil.copytree(run, place)
    former = Path.cwd()
    os.chdir(place)
    try:
        yield place
    finally:
        os.chdir(former)
        shutil.rmtree(place)


def outcome_of(command: str, kind: str, place: Path) -> Outcome:
    """Start the next command, and take what it leaves."""
    words = command.replace("{cpu}", str(ROOT / "ds_configs" / "cpu.json")).split()
    output = None if words[0] == "generate" else place / CONTINUED.get(kind, "next")
    code, said = run_command(words, output)
    left = {} if output is None else contents_of(output)
    if output is None and code == 0:
        left = {"text": "\n".join(line for line in said.splitlines() if ": " not in line)}
    return Outcome(code=code, said=said, files=left)


def contents_of(folder: Path) -> dict[str, str]:
    """Name → hash, of what is the result; of JSON without times."""
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        name = path.relative_to(folder).as_posix()
        parts = Path(name).parts
        is_result = path.name not in NOT_OF_THE_RESULT and parts[0] not in (
            "done",
            "checkpoints",
            "tensorboard",
        )
        if path.is_file() and is_result and not path.name.startswith((".", "events.", "log")):
            content = path.read_bytes()
            if path.suffix == ".json":
                content = TIMES.sub("", content.decode("utf-8", "replace")).encode()
                content = re.sub(rb'"content_sha256": "[0-9a-f]*"', b"", content)
            if path.suffix not in (".png", ".md"):
                found[name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def prepare(kind: str, place: Path) -> None:
    """What a command that continues finds: a training that was killed, answers to be completed."""
    if kind == "checkpoints":
        for path in (place / "memory").iterdir():
            if path.name in ("weights", "done"):
                shutil.rmtree(path)
            elif path.name == "manifest.json":
                path.unlink()


def judged(found: Outcome, expected: Outcome, damaged: Path) -> str:
    """The end of a trial, one of ENDS; the damaged file is named by its path below the run."""
    if "Traceback" in found.said or "this is a fault of" in found.said or found.code not in (0, 2):
        return "TRACEBACK"
    if found.code == 2:
        lines = [line for line in found.said.splitlines() if "error: " in line]
        is_named = len(lines) == 1 and any(name in lines[0] for name in damaged.parts[-3:])
        return "refused" if is_named else "TRACEBACK"
    return "same" if found.files == expected.files else "USED"


class Trials:
    """Trials on one run; what an undamaged run gives is computed once a command."""

    def __init__(
        self, run: Path, scratch: Path, seed: int, *, readers: Mapping[str, list[str]] = READERS
    ) -> None:
        self._run, self._scratch, self._seed, self._readers = run, scratch, seed, readers
        self.expected = functools.cache(self._expected)

    def _expected(self, kind: str, command: str) -> Outcome:
        with copied(self._run, self._scratch) as place:
            prepare(kind, place)
            found = outcome_of(command, kind, place)
        if found.code:
            sys.stderr.write(f"without damage, {command} fails:\n{found.said}\n")
        return found

    def trial(self, number: int, kinds: list[str]) -> Trial:
        """The trial of this number: the kind in turn, the rest by its seed."""
        generator = random.Random(f"{self._seed}-{number}")
        kind, operation = kinds[number % len(kinds)], generator.choice(OPERATIONS)
        command = generator.choice(self._readers[kind])
        expected = self.expected(kind, command)
        if expected.code:
            return Trial(
                number, kind, operation, "nothing", command.split()[0], "BROKEN", _error_in(expected)
            )
        with copied(self._run, self._scratch) as place:
            path = generator.choice(files_of(kind, place))
            damage(path, operation, generator)
            prepare(kind, place)
            found = outcome_of(command, kind, place)
        name = path.relative_to(place)
        end = judged(found, expected, name)
        return Trial(number, kind, operation, name.as_posix(), command.split()[0], end, _error_in(found))


def _error_in(found: Outcome) -> str:
    return next((line for line in found.said.splitlines() if "error: " in line), "")


def table_of(trials: list[Trial]) -> str:
    counts = Counter((trial.kind, trial.end) for trial in trials)
    kinds = sorted({trial.kind for trial in trials})
    rows = [["directory", "n", *ENDS]]
    for kind in kinds:
        ends = [counts[kind, end] for end in ENDS]
        rows.append([kind, str(sum(ends)), *map(str, ends)])
    for operation in OPERATIONS:
        ends = [sum(trial.operation == operation and trial.end == end for trial in trials) for end in ENDS]
        rows.append([operation, str(sum(ends)), *map(str, ends)])
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def main(argv: list[str] | None = None) -> int:
    say = functools.partial(print, flush=True)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--only", type=int, help="the number of one trial, to be repeated")
    parser.add_argument("--kinds", nargs="*", choices=list(READERS), default=list(READERS))
    parser.add_argument("--run", type=Path, help="where the undamaged run is kept; made where it is missing")
    options = parser.parse_args(argv)
    scratch = Path(
        tempfile.mkdtemp(prefix="damage-", dir=None if options.run is None else options.run.parent)
    )
    run, start = (options.run or scratch / "run").absolute(), time.monotonic()
    if not (run / "answers" / "manifest.json").is_file():
        make_run(run)
        say(f"the run is made, {time.monotonic() - start:.0f} s")
    trials, done = Trials(run, scratch, options.seed), []
    numbers = range(options.trials) if options.only is None else [options.only]
    with contextlib.suppress(KeyboardInterrupt):  # then the table is of those that were made
        for number in numbers:
            done.append(trials.trial(number, options.kinds))
            if done[-1].end not in ("refused", "same") or options.only is not None:
                say(str(done[-1]))
    say(table_of(done))
    say(f"{len(done)} trials, {time.monotonic() - start:.0f} s")
    os.chdir(ROOT)
    shutil.rmtree(scratch, ignore_errors=True)
    return int(any(trial.end not in ("refused", "same") for trial in done))


if __name__ == "__main__":
    sys.exit(main())
