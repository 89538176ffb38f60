#!/usr/bin/env python3
"""Check that two versions of this project write the same bytes and the same numbers.

    python tests/compare_runs.py BEFORE AFTER

BEFORE and AFTER are each a commit of this repository, a directory with a source tree, or a directory with
the results of an earlier comparison (--runs keeps them). Each version runs one small pipeline over the same
text, on one rank with one thread: corpus, base, keys, index, exact and IVF targets, a short training,
evaluation, export; two minutes. Both read the base that BEFORE trained, so that a difference in one stage
does not hide those of the next.

Compared are: the data files of every directory, byte for byte (manifests, records and logs may differ); the
lines of metrics.jsonl; eval.json, its arms by name, without times and hashes. A figure that lies elsewhere
in eval.json than before counts as moved, not as different. Prints a table; exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = (".npy", ".bin", ".tar", ".zst", ".index.json", ".faissindex", ".safetensors", "tokenizer.json")
# Figures of eval.json and metrics.jsonl that two runs of one version do not share.
TIMES = (
    "seconds",
    "time",
    "date",
    "tokens_per_second",
    "positions_per_second",
    "speeds",
    "memory_bytes",
    "mfu",
    "data_wait_share",
)
# What is said of the run and not measured by it; settings are flags, which have their own places.
HASHES = ("sha256", "inputs", "identity", "versions", "version", "machine", "settings")
NAMES = ("name", "arm")  # what tells the entries of a list apart
RENAMED_ARMS: dict[object, object] = {}  # name before → name after
ROUGH = {"bytes": 0.01}  # JSON files count among the bytes of an arm
# Part of a file's name → (largest share of its numbers that may differ, why).
ACCEPTED = {
    "knn_ivfpq": (
        0.001,
        "of keys at equal distance at the k-th place the first by id is taken, before the first of faiss",
    )
}
FOLDERS = ("corpus", "base", "keys", "index", "targets", "targets_ivf", "memory", "report", "export")
MAX_LINES = 12
# One command a line: the directory that it writes, its program, its flags. Paths lie in the run directory.
PIPELINE = """
corpus tools/prepare_corpus.py --input text --output corpus --tokenizer train:1024 --processes 1
    --block-size 128 --stride 64 --tuning-fraction .1 --test-fraction .1
base tools/train_base.py --ds-config {tree}/ds_configs/cpu.json --corpus corpus --output base
    --num-layers 2 --hidden-size 64 --num-heads 2 --epochs 2 --log-every-steps 1
keys tools/extract_keys.py --model model --corpus corpus --output keys --unit-positions 16384
    --input-point ffn_input
index tools/build_index.py --keys keys --output index --factory IVF32,PQ16x8 --num-shards 2
targets tools/write_targets.py --keys keys --corpus corpus --exclude same-document --output targets
    --search exact --k 64 --neighbour-perplexity 20 --shard-positions 16384
targets_ivf tools/write_targets.py --keys keys --index index --output targets_ivf
    --search ivf --nprobe 4 --k 64 --temperature 20 --encoding exact --shard-positions 32768
memory launch/train.py --ds-config {tree}/ds_configs/cpu.json --corpus corpus --keys keys --targets targets
    --model model --head base --output memory --num-blocks 2 --epochs 1 --ce-through mixture
    --log-every-steps 1 --validation-positions 2048
report launch/evaluate.py --model model --corpus corpus --keys keys --index index --targets targets
    --memory memory --control same_base=model --output report --nprobe 4 --speed-positions 64
    --samples 1 --bootstrap-samples 200
export tools/convert_checkpoint.py --checkpoint memory --model model --report report --output export
"""
RENAMED_FLAGS: dict[str, str] = {}  # as in PIPELINE → as in earlier commits


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of the pipeline."""

    name: str
    program: str
    words: list[str]


def stages() -> list[Stage]:
    lines = PIPELINE.strip().replace("\n ", " ").splitlines()
    return [Stage(name=name, program=program, words=words) for name, program, *words in map(str.split, lines)]


def write_text(root: Path, num_bytes: int) -> None:
    """Copy modules of the standard library, in the order of their names, up to `num_bytes`."""
    root.mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        size = path.stat().st_size
        if num_bytes >= size:
            shutil.copyfile(path, root / path.name)
            num_bytes -= size


def source_tree(version: str, scratch: Path) -> Path:
    """The directory of that name, or the files of that commit unpacked under `scratch`."""
    if Path(version).is_dir():
        return Path(version).resolve()
    tree = scratch / "trees" / commit_of(version)
    if not tree.is_dir():
        tree.mkdir(parents=True)
        archive = subprocess.Popen(["git", "-C", str(ROOT), "archive", version], stdout=subprocess.PIPE)
        with tarfile.open(fileobj=archive.stdout, mode="r|") as files:
            files.extractall(tree, filter="data")
        if archive.wait() != 0:
            raise SystemExit(f"git archive {version} failed")
    return tree


def commit_of(version: str) -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--short=12", f"{version}^{{commit}}"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode != 0:
        raise SystemExit(f"{version} is neither a directory nor a commit: {found.stderr.strip()}")
    return found.stdout.strip()


def run_pipeline(tree: Path, run: Path, *, model: Path | None, num_bytes: int) -> None:
    """Run what `run` lacks of the pipeline with the source in `tree`, over `model` (None: its own base)."""
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "text").is_dir():
        write_text(run / "text", num_bytes)
    for stage in stages():
        if (run / "done" / stage.name).exists():
            continue
        if stage.name == "keys" and not (run / "model").is_dir():
            copy_model(model or run / "base", run / "model")
        start = time.monotonic()
        run_stage(stage, tree, run)
        (run / "done").mkdir(exist_ok=True)
        (run / "done" / stage.name).touch()
        print(f"{run.name}: {stage.name} took {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def copy_model(source: Path, target: Path) -> None:
    """Copy the Hugging Face model without what the training wrote next to it."""
    target.mkdir()
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        shutil.copyfile(source / name, target / name)


def run_stage(stage: Stage, tree: Path, run: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX", "SLURM_"))
    }
    environment |= {
        "PYTHONPATH": str(tree),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    program = [sys.executable, str(tree / stage.program)]
    words = []
    for word in stage.words:
        if word in RENAMED_FLAGS:
            said = subprocess.run([*program, "--help"], env=environment, capture_output=True, text=True)
            word = word if f"{word} " in said.stdout else RENAMED_FLAGS[word]
        words.append(word.replace("{tree}", str(tree)))
    with open(run / f"{stage.name}.txt", "w") as said:
        code = subprocess.run(
            [*program, *words], cwd=run, env=environment, stdout=said, stderr=said
        ).returncode
    if code != 0:
        tail = (run / f"{stage.name}.txt").read_text()[-2000:]
        raise SystemExit(
            f"{tail}\n{stage.program} of {tree} ended with {code}: python {' '.join([*program[1:], *words])}"
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was compared in one directory and what differs; `notes` are changes of names and places alone."""

    name: str
    num_equal: int
    differences: list[str]
    notes: list[str]


def compare_files(name: str, before: Path, after: Path) -> Row:
    """Data files by name and content; one with the same content under another name is a note."""
    old, new = hashes(before), hashes(after)
    equal = {path for path in old if old[path] == new.get(path)}
    lost = {path: old[path] for path in old if path not in new}
    added = {path: new[path] for path in new if path not in old}
    differences, notes = [], []
    for path in old:
        if path in new and path not in equal:
            reason = accepted(before / path, after / path)
            (notes if reason else differences).append(f"{path}: {reason or 'other bytes'}")
    for path, content in lost.items():
        twin = next((other for other, its_content in added.items() if its_content == content), None)
        if twin is None:
            differences.append(f"{path}: only before")
        else:
            added.pop(twin)
            equal.add(path)
            notes.append(f"{path} is now {twin}")
    differences += [f"{path}: only after" for path in added]
    if not old:
        differences.append("no data files")
    return Row(name=f"{name}: files", num_equal=len(equal), differences=differences, notes=notes)


def accepted(before: Path, after: Path) -> str | None:
    """Why these two arrays may differ as they do; None if they may not."""
    import numpy as np

    for part, (max_share, reason) in ACCEPTED.items():
        if part in before.name and before.suffix == ".npy":
            old, new = np.load(before), np.load(after)
            if old.shape == new.shape and (old != new).mean() <= max_share:
                return f"{(old != new).sum()} of {old.size:,} numbers differ: {reason}"
    return None


def hashes(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.name.endswith(DATA)
        and not {"checkpoints", "best", "done"} & set(path.parts)  # before the end
    }


def compare_figures(name: str, before: Any, after: Any) -> Row:
    """Every figure but times and hashes; one that was moved or renamed within its arm is a note."""
    old, new = dict(figures(before)), dict(figures(after))
    equal = {path for path in old if path in new and alike(path, old[path], new[path])}
    differences = [f"{path}: {old[path]} → {new[path]}" for path in old if path in new and path not in equal]
    lost, added, notes = (
        [path for path in old if path not in new],
        [path for path in new if path not in old],
        [],
    )
    for same_leaf in (True, False):
        for path in list(lost):
            twin = next(
                (other for other in added if old[path] == new[other] and moved(path, other, same_leaf)), None
            )
            if twin is not None and (same_leaf or isinstance(old[path], float)):
                lost.remove(path)
                added.remove(twin)
                equal.add(path)
                notes.append(f"{path} is now {twin}")
    differences += [f"{path}: {old[path]}, only before" for path in lost if old[path] is not None]
    notes += [f"{path}: {new[path]}, only after" for path in added]
    if not old:
        differences.append("no figures")
    return Row(name=name, num_equal=len(equal), differences=differences, notes=notes)


def figures(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf; entries of a list are called by their name, or else by their number."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key not in TIMES and key not in HASHES:
                yield from figures(value, f"{path}/{RENAMED_ARMS.get(key, key)}")
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for number, entry in enumerate(node):
            name = (
                next((entry[key] for key in NAMES if key in entry), number)
                if isinstance(entry, Mapping)
                else number
            )
            yield from figures(entry, f"{path}/{RENAMED_ARMS.get(name, name)}")
    else:
        yield path, RENAMED_ARMS.get(node, node) if isinstance(node, str) else node


def alike(path: str, old: Any, new: Any) -> bool:
    if leaf(path) in ROUGH and old and new:
        return abs(new - old) <= ROUGH[leaf(path)] * abs(old)
    return old == new and type(old) is type(new)


def leaf(path: str) -> str:
    """The last word of a path, which says what a figure is."""
    return path.rpartition("/")[2]


def moved(path: str, other: str, same_leaf: bool) -> bool:
    """Whether both speak of the same arm, and by the same word if `same_leaf`."""
    arms = [
        {word for word in one.split("/") if word.startswith("base") or "+" in word} for one in (path, other)
    ]
    return arms[0] == arms[1] and (not same_leaf or leaf(path) == leaf(other))


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def compare(before: Path, after: Path) -> list[Row]:
    """All rows of the table, for two run directories."""
    rows = [compare_files(name, before / name, after / name) for name in FOLDERS]
    for name in ("base", "memory"):
        old, new = (read_lines(root / name / "metrics.jsonl") for root in (before, after))
        rows.append(compare_figures(f"{name}: metrics.jsonl", old, new))
    old, new = (json.loads((root / "report" / "eval.json").read_bytes()) for root in (before, after))
    rows.append(compare_figures("report: eval.json", old, new))
    return rows


def show(rows: Sequence[Row]) -> None:
    print(f"{'compared':28s} {'equal':>6s} {'different':>9s} {'moved or new':>12s}")
    for row in rows:
        print(f"{row.name:28s} {row.num_equal:6d} {len(row.differences):9d} {len(row.notes):12d}")
    for row in rows:
        for mark, lines in (("DIFFERENT", row.differences), ("moved or new", row.notes)):
            for line in lines[:MAX_LINES]:
                print(f"{mark}  {row.name}  {line}")
            if len(lines) > MAX_LINES:
                print(f"{mark}  {row.name}  … and {len(lines) - MAX_LINES:,} more")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", help="a commit, a source tree, or a run directory that --runs kept")
    parser.add_argument("after", help="the same")
    parser.add_argument(
        "--runs", type=Path, help="keep the runs of commits in this directory, and read those that it has"
    )
    parser.add_argument("--text-bytes", type=int, default=300_000, help="bytes of text (default: 300,000)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        before = prepared_run(options.before, "before", scratch, options.runs, None, options.text_bytes)
        after = prepared_run(options.after, "after", scratch, options.runs, before, options.text_bytes)
        rows = compare(before, after)
    show(rows)
    return int(any(row.differences for row in rows))


def prepared_run(
    version: str, side: str, scratch: Path, kept: Path | None, before: Path | None, num_bytes: int
) -> Path:
    """The run directory of one side, made if it is missing; AFTER reads the base of the run `before`."""
    if (Path(version) / "done" / "export").exists():
        return Path(version)
    if Path(version).is_dir():
        run = scratch / side
    else:
        reader = f"-reads-{before.name}" if before is not None else ""
        run = (kept or scratch) / f"{commit_of(version)}{reader}"
    model = before / "model" if before is not None else None
    run_pipeline(source_tree(version, scratch), run, model=model, num_bytes=num_bytes)
    return run


if __name__ == "__main__":
    sys.exit(main())
