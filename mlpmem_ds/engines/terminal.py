"""One screen of a terminal that is drawn anew again and again, with rich; left, the terminal is as it was."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

Row = tuple[Sequence[str], str]
"""a row's cells, and its style, such as `red` or `bold`"""
Draw = Callable[[str, Sequence[Row], Sequence[str]], None]
"""draws a heading, the rows of the table, and lines below it"""


@contextlib.contextmanager
def open_table(columns: Sequence[str]) -> Iterator[Draw]:
    """What draws a table with these columns on standard output, which is a terminal."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def draw(heading: str, rows: Sequence[Row], lines: Sequence[str]) -> None:
        table = Table(*columns, expand=True, box=None)
        for cells, style in rows:
            table.add_row(*map(Text, cells), style=style)
        live.update(Group(Text(heading), table, *map(Text, lines)), refresh=True)

    with Live(console=Console(file=sys.stdout), screen=True, auto_refresh=False) as live:
        yield draw
