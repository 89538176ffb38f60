"""Prompts as they stand in flags and files: no line is split, lost or cleaned in silence."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.stages.generation.config import Config
from mlpmem_ds.stages.generation.prompts import read_conversations, read_prompts

INSIDE = "one\N{LINE SEPARATOR}two\x85three\x0cfour\x0b\x1c\x1dfive\rsixseven\N{PARAGRAPH SEPARATOR}"


def of_file(path: Path) -> list[str]:
    return read_prompts(Config(model="m", prompts_file=path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a b\nc\n", ["a b", "c"]),
        (b"a b\nc", ["a b", "c"]),
        (b"\xef\xbb\xbfa b\r\nc\r\n", ["a b", "c"]),
        (b"  a \n\tb\n", ["  a ", "\tb"]),
        (f"{INSIDE}\n{INSIDE}x".encode(), [INSIDE, INSIDE + "x"]),
        ("a b\r\nc\r\n".encode("utf-16"), ["a b", "c"]),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}\n\N{GRINNING FACE}".encode(), ["é", "😀"]),
    ],
)
def test_a_line_is_a_prompt(content: bytes, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert of_file(path) == expected


def test_blank_lines_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a\n\n \t\nb\n\n")
    with caplog.at_level(logging.WARNING):
        assert of_file(path) == ["a", "b"]
    assert "blank lines are no prompts and are left out: 3 (line 2, 3, 5)" in caplog.text
    caplog.clear()
    path.write_text("a\nb\n")
    assert of_file(path) == ["a", "b"] and not caplog.records


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(b"a\nb\n"))
    writer.start()
    assert of_file(path) == ["a", "b"]
    writer.join()


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        (b"", "holds no prompt: write one a line"),
        (b"\n \n", "holds no prompt"),
        (b"ab\ncaf\xe9\n", "line 2 is not UTF-8"),
        ("a\nb".encode("utf-16-le"), "line 1 holds zero bytes"),
        (None, "cannot be read"),
    ],
)
def test_unreadable_files(content: bytes | None, needle: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=needle):
        of_file(path)


@pytest.mark.parametrize("prompt", [os.fsdecode(b"caf\xe9"), "a\ud800b"])
def test_bytes_that_are_no_text_are_refused_with_their_place(prompt: str) -> None:
    config = Config(model="m", prompt=("fine", prompt))
    with pytest.raises(UserError, match=r"--prompt: prompt 2 holds '\\ud.*' at character [24].*as UTF-8"):
        read_prompts(config)


def test_json_lines_hold_prompts_of_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    texts = ["a\nb\N{LINE SEPARATOR}c", " ", INSIDE, "\x00"]
    lines = [json.dumps({"prompt": text, "id": 3}, ensure_ascii=False) for text in texts]
    path.write_text("\ufeff" + "\r\n".join([*lines, "", json.dumps("plain")]), encoding="utf-8")
    assert of_file(path) == [*texts, "plain"]
    for line, needle in (
        ('"a"\n{"text": "b"}', "line 2 is no text and has none in `prompt`"),
        ('{"prompt": 3}', "line 1 is no text"),
        ('{"prompt": "a"}\n{"prompt', "line 2 is not JSON"),
        ("\n", "holds no prompt"),
    ):
        path.write_text(line)
        with pytest.raises(UserError, match=needle):
            of_file(path)
    path.write_text(r'["fine", "a\ud800"]')
    with pytest.raises(UserError, match="prompt 2 holds"):
        of_file(path)


def chats_of(path: Path, *lines: object, system: str | None = None) -> list[list[tuple[str, str]]]:
    path.write_text("\n".join(map(json.dumps, lines)))
    found = read_conversations(Config(model="m", prompts_file=path, chat=True, system=system))
    return [[(message["role"], message["content"]) for message in one.messages] for one in found]


def test_a_line_may_bring_its_own_system_message(tmp_path: Path) -> None:
    path, turn = tmp_path / "prompts.jsonl", {"role": "user", "content": "b"}
    own = {"prompt": "[a]", "system": "s"}
    asked, told = [("user", "[a]")], [("system", "s"), ("user", "[a]")]
    assert chats_of(path, own, {"prompt": "[a]", "completion": "c"}, "[a]") == [told, asked, asked]
    assert chats_of(path, {"prompt": "[a]"}, "[a]", system="s") == [told, told]
    path.write_text(json.dumps(own))
    with pytest.raises(UserError, match="line 1 has a system message, which only --chat reads"):
        of_file(path)
    two = {"messages": [{"role": "system", "content": "t"}, turn]}
    for lines, system, needle in (
        (["x", own], "t", "conversation 2 has a system message of its own, and --system gives another"),
        (["x", two], "t", "conversation 2 has a system message of its own"),
        ([{**two, "system": "s"}], None, "line 1 has two system messages at its head"),
        ([{"prompt": "a", "messages": [turn]}], None, "line 1 has both `prompt` and `messages`"),
    ):
        with pytest.raises(UserError, match=needle):
            chats_of(path, *lines, system=system)


def test_utf_8_in_a_locale_of_ascii_is_read() -> None:
    word = "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{SNOWMAN}"
    prompts = (word.encode("utf-8").decode("ascii", "surrogateescape"), word, "a")
    assert read_prompts(Config(model="m", prompt=prompts)) == [word, word, "a"]
