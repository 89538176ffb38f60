"""Each flag that a message names is one of the front-end that can print it, or the message says whose it is.

Read from the source: which functions and classes a command reaches, by the names that each uses, and the
texts in them. An object's methods count with its class, so that some that cannot run are looked at too; those
are in `CANNOT_BE`, with the reason.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from mlpmem_ds.commands import COMMANDS, Command, _load

from .test_floors import ROOT, modules

Place = tuple[str, str]  # a module, and a name that it defines at its top

# words of a message → the commands whose flags it may then name
WORDS = {
    r"\bprepar": ("prepare-corpus",),
    r"\bextract": ("extract-keys",),
    r"\bbuild (one|it|the index)": ("build-index",),
    r"\bwrite the targets": ("write-targets",),
    r"\bfetch_base\b": ("fetch-base",),
    r"\binspect_run\.py\b": ("inspect-run",),
    r"\btrain\b|launch/train.py|\btraining": ("train", "train-base"),
}
OTHER_PROGRAMS = {
    r"\bpip download\b": "--no-deps",
    r"--hash=sha256": "--hash",  # of pip
    r"\bpip install\b": "--no-build-isolation",
    r"\bsrun\b": "--mpi",
    r"\bhf download\b": "--local-dir",
    r"\btorchrun\b": "--nproc-per-node",
    r"\bdeepspeed\b": "--num-accelerators",
}
OF_ALL = {"--help", "--version"}
# (module, flag) → why no command without the flag can print it
CANNOT_BE: Mapping[tuple[str, str], str] = {
    ("core.files", "--output"): "a command that fills another place than --output gives its own remedy",
    ("engines.devices", "--device"): "without the flag it is auto, which is always here",
    ("engines.hidden_states", "--attention"): "without the flag it is one that was found to run here",
}


@functools.cache
def _files() -> dict[str, Path]:
    return modules(ROOT)


@functools.cache
def _definitions() -> dict[Place, ast.AST]:
    """What each module defines at its top: functions, classes, and values by their names."""
    found: dict[Place, ast.AST] = {}
    for module, path in _files().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[module, node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        found[module, target.id] = node
    return found


@functools.cache
def _imported(module: str) -> dict[str, Place]:
    """Name in a module → what of the package it stands for; a module is (module, "")."""
    path = _files()[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: dict[str, Place] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                name = alias.asname or alias.name
                found[name] = (whole, "") if whole in _files() else (source, alias.name)
    return found


@functools.cache
def _uses(place: Place) -> frozenset[Place]:
    """What a definition names."""
    module, node = place[0], _definitions()[place]
    found: set[Place] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name):
            owner = _imported(module).get(child.value.id)
            if owner is not None and owner[1] == "":
                found.add((owner[0], child.attr))
        if isinstance(child, ast.Name):
            found.add(_imported(module).get(child.id, (module, child.id)))
    return frozenset(use for use in found if use in _definitions())


def _reached(command: Command) -> set[Place]:
    run, config = (f"mlpmem_ds.stages.{place}".split(":") for place in (command.run, command.config))
    found, to_do = set(), [(run[0], run[1]), (config[0], config[1])]
    while to_do:
        place = to_do.pop()
        is_other_config = (
            place[1].endswith("Config") and place[0].endswith(".config") and place != tuple(config)
        )
        if place not in found and place in _definitions() and not is_other_config:
            found.add(place)
            to_do += _uses(place)
    return found


def _texts(node: ast.AST) -> Iterator[str]:
    """The texts in a definition that name flags, but docstrings, and values that are a flag and nothing
    else."""
    parts = {
        id(part) for text in ast.walk(node) if isinstance(text, ast.JoinedStr) for part in ast.walk(text)
    }
    parts |= {
        id(child.value)
        for child in ast.walk(node)
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
    }
    for child in ast.walk(node):
        if isinstance(child, ast.JoinedStr):
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in child.values)
        elif isinstance(child, ast.Constant) and isinstance(child.value, str) and id(child) not in parts:
            text = child.value
        else:
            continue
        if "--" in text and not re.fullmatch(r"--[\w-]+", text):
            yield text


def _flags(command: Command) -> set[str]:
    fields = dataclasses.fields(_load(command.config))
    names = {(field.metadata.get("flag") or field.name).replace("_", "-") for field in fields}
    return {f"--{name}" for name in names} | {f"--no-{name}" for name in names} | OF_ALL


def _faults(name: str) -> Iterator[str]:
    command, all_flags = (
        COMMANDS[name],
        {key: _flags(c) for key, c in COMMANDS.items() if isinstance(c, Command)},
    )
    assert isinstance(command, Command)
    for module, defined in sorted(_reached(command)):
        for text in _texts(_definitions()[module, defined]):
            allowed = set(all_flags[name])
            for words, commands in WORDS.items():
                if re.search(words, text):
                    allowed = allowed.union(*(all_flags[other] for other in commands))
            for other in all_flags:
                if re.search(rf"\b{other.replace('-', '[-_]')}\b", text):
                    allowed |= all_flags[other]
            allowed |= {flag for words, flag in OTHER_PROGRAMS.items() if re.search(words, text)}
            for word in re.findall(r"(?<![\w-])--[a-z][a-z_-]*", text):
                flag, short = word.replace("_", "-"), module.removeprefix("mlpmem_ds.")
                if flag not in allowed and (short, flag) not in CANNOT_BE:
                    yield f"{short}.{defined} names {flag}, which {name} does not have: {text}"


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if isinstance(command, Command)])
def test_messages_name_flags_that_the_front_end_has(name: str) -> None:
    assert sorted(set(_faults(name))) == []


def test_a_flag_of_another_front_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "CANNOT_BE", {})
    faults = "\n".join(_faults("train"))
    assert "engines.devices.device_of_rank names --device, which train does not have" in faults
    assert "--attention" in faults
    assert not list(_faults("evaluate"))  # which has both
