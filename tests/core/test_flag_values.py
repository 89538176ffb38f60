"""Words of a command line as values: paths as shells leave them, whole numbers, and what no one meant."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.flag_values import converter_of


def read(base: Any, word: str, **settings: Any) -> Any:
    return converter_of(base, **settings)(word)


def test_a_pipe_is_not_waited_for_unless_the_shell_gives_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(argparse.ArgumentTypeError, match="is a named pipe"):
        read(Path, str(tmp_path / "pipe"))
    for given in ("/dev/stdin", "/dev/fd/0", "/dev/null"):
        assert read(Path, given) == Path(given)


def test_paths_as_shells_leave_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    odd = tmp_path / "a 'b' \"c\" ü $x\nd"
    line_end = tmp_path / "from dos\r"
    line_end.mkdir()
    for word, path in [
        ("~/run", Path("/home/me/run")),
        ("~", Path("/home/me")),
        ("~run", Path("~run")),
        ("./~/run", Path("~/run")),
        (str(odd), odd),
        (str(line_end), line_end),
        (" out ", Path(" out ")),
        ("caf\udce9", Path("caf\udce9")),
    ]:
        assert read(Path, word) == path


def test_a_url_is_a_path_only_where_one_is_taken() -> None:
    url = "s3://bucket/run"
    with pytest.raises(argparse.ArgumentTypeError, match="is a URL, and this is a local path"):
        read(Path, url)
    assert str(read(Path, url, takes_url=True)) == str(Path(url))


@pytest.mark.parametrize(
    ("word", "value"), [("1e9", 10**9), ("1_000_000", 10**6), ("2.5e3", 2500), ("64.0", 64)]
)
def test_whole_numbers_may_be_written_short(word: str, value: int) -> None:
    assert read(int, word) == value


@pytest.mark.parametrize("word", ["1.5", "many", "nan", "inf", "1e999999999"])
def test_what_is_no_whole_number_is_refused(word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{word}' is no whole number, such as"):
        read(int, word)


def test_none_is_a_number_only_where_it_may_be() -> None:
    assert read(int, "none", may_be_none=True) is None and read(float, "none", may_be_none=True) is None
    assert read(float, "0.5", may_be_none=True) == 0.5 and read(str, "none", may_be_none=True) == "none"
    with pytest.raises(ValueError, match="could not convert"):
        read(float, "none")
    assert converter_of(float, may_be_none=True).__name__ == "float"  # argparse names it
    assert read(int, "first", parse=len) == 5 and read(int, "none", parse=len, may_be_none=True) is None


def test_a_text_says_something() -> None:
    assert read(str, " a ") == " a "
    with pytest.raises(argparse.ArgumentTypeError, match="is empty: is a variable unset"):
        read(str, " \t")
