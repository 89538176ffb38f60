"""Part of `quality`: Markdown with lines no longer than those of the other pages in docs/."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

_WIDTH = 98


def paragraph(text: str) -> str:
    """Prose, broken between words only, so that a link or a command stays whole."""
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def item(text: str) -> str:
    """An item of a list."""
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent="- ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def shell_command(start: str, words: Sequence[str]) -> str:
    """A shell command over as many lines as it needs, each word (a flag and its value) on one."""
    lines = [start]
    for word in words:
        if len(lines[-1]) + len(word) + 3 > _WIDTH:
            lines.append("   ")
        lines[-1] += f" {word}"
    return " \\\n".join(lines)
