"""Rules on text of users: how it is cut into lines, and in which encoding it is read. The other rules of the
tree are in test_rules.py."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def violations(text: str) -> Iterator[str]:
    """`splitlines` also splits at U+2028, U+0085, form feeds and more, which names, messages and JSON hold;
    and text without `encoding=` is read as the user's shell says, in ASCII for example."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr == "splitlines":
            yield f'line {node.lineno} splits lines: split("\\n"), or first_line(error) of core/errors.py'
        if isinstance(node, ast.Call) and is_read_as_the_shell_says(node):
            yield f"line {node.lineno}: {ast.unparse(node.func)}(…) without encoding="


def is_read_as_the_shell_says(call: ast.Call) -> bool:
    """Whether a call of open, read_text, write_text or of a process names no encoding for its text."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    words = {word.arg: word.value for word in call.keywords}
    if "encoding" in words:
        return False
    if name in ("run", "Popen", "check_output"):
        return "text" in words
    if name == "open" and isinstance(call.func, ast.Name):
        mode = words.get("mode") or (call.args[1] if len(call.args) > 1 else None)
        return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))
    return name in ("read_text", "write_text")


def test_the_tree_keeps_the_rules() -> None:
    paths = [path for folder in ("mlpmem_ds", "tools", "launch") for path in (ROOT / folder).rglob("*.py")]
    found = {
        path.relative_to(ROOT).as_posix(): list(violations(path.read_text(encoding="utf-8")))
        for path in paths
    }
    assert {path: texts for path, texts in found.items() if texts} == {}


@pytest.mark.parametrize(
    "text",
    [
        "x = str(error).splitlines()[0]",
        "open('x').read()",
        "open('x', 'a')",
        "path.read_text()",
        "path.write_text(x)",
        "subprocess.run(x, text=True)",
    ],
)
def test_a_planted_violation_is_found(text: str) -> None:
    assert len(list(violations(text))) == 1


def test_what_is_allowed_is_no_violation() -> None:
    allowed = "open('x', 'rb'), tarfile.open(x), subprocess.run(x), path.read_text(encoding='ascii')"
    assert list(violations(allowed)) == []
