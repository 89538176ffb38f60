"""Part of `inspect_run --discard`: what in a run directory was made from what.

A stage names what it was made from by the hash of the input's manifest (identity.json, of an export its own
list), and by the paths of its flags (run.json), which is how a model is found: its hash is of its weights. A
report names the gates of its arms in eval.json, also where the run was moved and its paths are of another
place. A stage that is being mended has no manifest; its log says what it was before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import read_json_object, sha256_of_file
from mlpmem_ds.core.log import read_events
from mlpmem_ds.formats.evaluation import EVALUATION_NAME
from mlpmem_ds.stages.inspection.contents import EXPORT_FILE, find_directories
from mlpmem_ds.stages.inspection.watch import name_of

INPUTS = frozenset(
    {
        "calibrate",
        "chat_template",
        "checkpoint",
        "choices_from",
        "control",
        "corpus",
        "data",
        "datastore",
        "ds_config",
        "ensemble",
        "from_reference",
        "gate",
        "general",
        "gguf",
        "include_path",
        "index",
        "init_from",
        "input",
        "input_model",
        "keys",
        "match_memory",
        "memory",
        "model",
        "passages",
        "prompts_file",
        "questions",
        "ranking",
        "raw_keys",
        "report",
        "targets",
        "text",
        "tokenizer",
        "wheel",
    }
)
"""flags that name what a stage reads; the value of another, such as `auto`, may be the name of a directory by
chance"""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A directory that a command made."""

    root: Path
    name: str
    """its path below the run directory"""
    hashes: frozenset[str]
    """of its manifest, now and at earlier ends"""
    inputs: frozenset[str]
    """hashes of what it was made from"""
    paths: frozenset[Path]
    """that its flags named"""

    def is_from(self, other: Made) -> bool:
        """Whether it was made from `other`, or lies in it and is about it."""
        return self.root != other.root and (
            bool(self.inputs & other.hashes)
            or any(path == other.root or other.root in path.parents for path in self.paths)
        )


def read_made(run: Path) -> list[Made]:
    """Every stage and export at or below `run`: those that `contents.read_run` finds."""
    stages, exports = find_directories(run)
    return [_read_stage(run, root) for root in stages] + [_read_export(run, root) for root in exports]


def dependents_of(made: Made, among: Sequence[Made]) -> list[Made]:
    """What was made from it, directly or not: what comes later in the pipeline first."""
    found: list[Made] = []
    seen = {made.root}

    def visit(source: Made) -> None:
        for other in among:
            if other.root not in seen and other.is_from(source):
                seen.add(other.root)
                visit(other)
                found.append(other)

    visit(made)
    return found


def _read_stage(run: Path, root: Path) -> Made:
    identity, description = _read(root / "identity.json"), _read(root / "run.json")
    events = read_events(root / "log.jsonl")
    manifests = {str(event.get("manifest")) for event in events if event.get("event") == "complete"}
    flags = description.get("config", {})
    flags = flags if isinstance(flags, dict) else {}
    arms = _read(root / EVALUATION_NAME).get("arms")
    read = {name: value for name, value in flags.items() if name in INPUTS}
    return Made(
        root=root.resolve(),
        name=name_of(run, root),
        hashes=frozenset(manifests | _hash_of(root / "manifest.json")),
        inputs=frozenset([*_texts(identity.get("inputs")), *_texts(arms)]),
        paths=frozenset(path for text in _texts(read) for path in _paths(text, run)),
    )


def _read_export(run: Path, root: Path) -> Made:
    return Made(
        root=root.resolve(),
        name=name_of(run, root),
        hashes=frozenset(_hash_of(root / EXPORT_FILE)),
        inputs=frozenset(_texts(_read(root / EXPORT_FILE).get("inputs"))),
        paths=frozenset(),
    )


def _hash_of(path: Path) -> set[str]:
    return {sha256_of_file(path)} if path.is_file() else set()


def _read(path: Path) -> dict[str, Any]:
    """An object of ours; {} where it cannot be read."""
    try:
        return read_json_object(path)
    except DamagedDataError:
        return {}


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _paths(text: str, run: Path) -> Iterator[Path]:
    """The existing path that a flag's value may name, itself or behind `NAME=`: as seen from here, or from
    where the run directory lies."""
    for word in {text, text.partition("=")[2]}:
        if not word or "\n" in word or len(word) > 1000:
            continue
        for start in (Path.cwd(), run.resolve().parent):
            path = start / word
            if path.exists():
                yield path.resolve()
