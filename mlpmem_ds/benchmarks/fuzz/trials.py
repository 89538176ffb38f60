"""Part of `fuzz_readers`: files of known content are written, read, damaged and read again.

A whole file must give exactly its content. A damaged one must be refused with a message that names it, or
give what its bytes hold by an independent reading (target.py); what is left out must be counted by name. Any
other error, a hang, a crash and memory without bound are failures.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from mlpmem_ds.benchmarks.fuzz import csvs, documents, own_files, tables, tars, user_files, zips
from mlpmem_ds.benchmarks.fuzz.bounded import Lost, call_bounded
from mlpmem_ds.benchmarks.fuzz.config import Config
from mlpmem_ds.benchmarks.fuzz.mutations import mutate
from mlpmem_ds.benchmarks.fuzz.target import Content, Damaged, Sample, Target
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.core.world import World

TARGETS: Mapping[str, Target] = {
    **documents.TARGETS,
    "csv": csvs.TARGET,
    "tar": tars.TARGET,
    "zip": zips.TARGET,
    **tables.TARGETS,
    **own_files.TARGETS,
    **user_files.TARGETS,
}
_FAILED = "FAILED"
_SHOWN = 300  # characters of a message


class Outcome(NamedTuple):
    """What became of an input: `kind` is counted, `detail` is shown of a failure."""

    target: str
    seed: int
    mutation: str
    kind: str
    detail: str = ""

    @property
    def is_failure(self) -> bool:
        return self.kind == _FAILED


def try_input(target: Target, seed: int, others: Sequence[Target], keep: Path | None = None) -> Outcome:
    """Write a sample, read it, damage one of its files, and read it again."""
    random = Random(f"{target.name} {seed}")
    mutation = "none"
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        root = Path(scratch)
        try:
            folder = root / "in"
            folder.mkdir()
            sample = target.write(random, folder)
            if fault := fault_of_whole(target, sample):
                kind, detail = _FAILED, fault
            else:
                mutation = _damage(random, sample, random.choice(others), root)
                kind, detail = judge(target, sample)
            outcome = Outcome(target.name, seed, mutation, kind, detail)
        except BaseException:  # also a panic of a library written in Rust
            outcome = Outcome(target.name, seed, mutation, _FAILED, traceback.format_exc())
        if keep is not None and outcome.is_failure:
            shutil.copytree(root, keep / f"{target.name}-{seed}", dirs_exist_ok=True)
    return outcome


def fault_of_whole(target: Target, sample: Sample) -> str | None:
    """Say what is wrong with the reading of files that are whole, or None."""
    if target.expect is not None and (expected := target.expect(sample)) != sample.content:
        return f"the independent reading of a whole file is wrong: {_difference(expected, sample.content)}"
    try:
        content = target.read(sample)
    except UserError as error:
        return f"a whole file is refused: {error}"
    if content != sample.content:
        return f"a whole file is read as another: {_difference(content, sample.content)}"
    return None


def _damage(random: Random, sample: Sample, other: Target, root: Path) -> str:
    """Change the bytes of a file of the sample; the name of the mutation."""
    path = random.choice(sample.files)
    folder = root / "other"
    folder.mkdir()
    foreign = random.choice(other.write(random, folder).files).read_bytes()
    name, content = mutate(random, path.read_bytes(), foreign)
    path.write_bytes(content)
    return name


def judge(target: Target, sample: Sample) -> tuple[str, str]:
    """(outcome, detail) of reading a sample whose files may be damaged."""
    try:
        content = target.read(sample)
    except UserError as error:
        names = [path.name for path in (*sample.files, *sample.inputs)]
        if not any(name in str(error) for name in names):
            return _FAILED, f"the message names no file: {error}"
        return "refused", str(error)
    if content == sample.content:
        return "same", ""
    if target.expect is None:
        return "as its bytes say", ""
    try:
        expected = target.expect(sample)
    except Damaged as error:
        return _FAILED, f"damage ({error}) was read as {_difference(content, sample.content)}"
    if content == expected:
        return ("left out by name" if expected.num_left_out else "as its bytes say"), ""
    if _is_explained(content, expected):
        return "left out by name", ""
    return _FAILED, f"its bytes were read as others: {_difference(content, expected)}"


def _is_explained(content: Content, expected: Content) -> bool:
    """Whether only such values are missing as were left out by name, in addition to those expected."""
    rest = iter(expected.values)
    is_part = all(value in rest for value in content.values)  # in the same order
    num_missing = len(expected.values) + expected.num_empty - len(content.values) - content.num_empty
    return is_part and 0 <= num_missing <= content.num_left_out - expected.num_left_out


def _difference(content: Content, expected: Content) -> str:
    for number, (value, other) in enumerate(zip(content.values, expected.values, strict=False)):
        if value != other:
            return (
                f"{len(content.values)} values (of {len(expected.values)}), number {number} is"
                f" {value!r:.{_SHOWN}} instead of {other!r:.{_SHOWN}}"
            )
    return (
        f"{len(content.values)} values, {content.num_left_out} left out and {content.num_empty} empty instead"
        f" of {len(expected.values)}, {expected.num_left_out} and {expected.num_empty}"
    )


def run(config: Config, world: World) -> tuple[str, bool]:
    """Try all inputs; (the report, whether none failed)."""
    names = list(config.reader or TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        raise UserError(f"--reader {unknown[0]} is none of {', '.join(TARGETS)}")
    targets = [TARGETS[name] for name in names]
    if config.keep is not None:
        config.keep.mkdir(parents=True, exist_ok=True)

    def attempt(number: int) -> Outcome:
        logging.disable(logging.CRITICAL)  # in the child alone
        target = targets[number % len(targets)]
        return try_input(target, config.seed + number, list(TARGETS.values()), config.keep)

    results = call_bounded(attempt, config.count, seconds=config.max_seconds, num_bytes=int(config.max_bytes))
    outcomes = [
        Outcome(names[number % len(names)], config.seed + number, "?", _FAILED, result.reason)
        if isinstance(result, Lost)
        else result
        for number, result in enumerate(results)
    ]
    if config.output is not None:
        publish_json(config.output, as_json(config, outcomes))
    return report(config, outcomes), not any(outcome.is_failure for outcome in outcomes)


def as_json(config: Config, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "seed": config.seed,
        "count": config.count,
        "counts": {name: dict(counts) for name, counts in counts_of(outcomes).items()},
        "failures": [outcome._asdict() for outcome in outcomes if outcome.is_failure],
    }


def counts_of(outcomes: Sequence[Outcome]) -> dict[str, Counter[str]]:
    """Reader → outcome → how often."""
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.target, Counter())[outcome.kind] += 1
    return counts


def report(config: Config, outcomes: Sequence[Outcome]) -> str:
    lines = [f"seed {config.seed}: {len(outcomes):,} inputs, each read whole and damaged"]
    for name, counts in counts_of(outcomes).items():
        shown = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        lines.append(f"  {name:12s} {shown}")
    failures = [outcome for outcome in outcomes if outcome.is_failure]
    for outcome in failures:
        lines += [
            f"{_FAILED} {outcome.target} {outcome.seed} ({outcome.mutation}): {outcome.detail.strip()}",
            f"  again: python tools/fuzz_readers.py --reader {outcome.target} --seed {outcome.seed}"
            " --count 1",
        ]
    lines.append(f"{len(failures)} failures")
    return "\n".join(lines)
