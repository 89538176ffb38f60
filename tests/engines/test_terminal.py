import io
import sys

import pytest

from mlpmem_ds.engines.terminal import open_table


def test_one_screen_is_drawn_anew_and_the_terminal_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="the screen is drawn by rich")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    with open_table(("stage", "done")) as draw:
        draw("the heading", [(("keys", "1 of 4 [units]"), "bold")], [])
        draw("the heading", [(("keys", "2 of 4 [units]"), "red")], ["a remark"])
    text = terminal.getvalue()
    assert "\x1b[?1049h" in text and text.endswith("\x1b[?25h\x1b[?1049l")  # the other screen, the cursor
    for words in ("the heading", "1 of 4 [units]", "2 of 4 [units]", "a remark", "stage"):
        assert words in text
