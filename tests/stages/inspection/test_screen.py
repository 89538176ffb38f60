import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.stages.inspection.progress import LastError, RankProgress, Slowest, StageProgress
from mlpmem_ds.stages.inspection.screen import cells_of, duration, open_screen, remarks_of


def rank(number: int, state: str = "working", since: float = 3) -> RankProgress:
    return RankProgress(
        rank=number,
        host="n1",
        state=state,  # type: ignore[arg-type]
        units=3,
        seconds_per_unit=4.0,
        seconds_since_sign=since,
    )


def stage(**changes: object) -> StageProgress:
    values = {
        "root": Path("run/targets"),
        "name": "targets",
        "state": "working",
        "of": "units",
        "done": 1200,
        "total": 4800,
        "per_second": 0.5,
        "seconds_left": 7200.0,
        "ranks": (rank(0), rank(1), rank(2, "silent", 840)),
        "slowest": Slowest(rank=1, host="n1", factor=2.53),
        "error": None,
        "num_bytes": 3_200_000,
        "started": 1.0,
    }
    return StageProgress(**{**values, **changes})  # type: ignore[arg-type]


def test_a_stage_in_words() -> None:
    assert cells_of(stage()) == (
        "targets",
        "working",
        "1,200 of 4,800 units",
        "30.0 units/min",
        "2 h 00 min",
        "2 working, 1 silent",
        "rank 1 (n1) takes 2.5 times as long",
        "3.20 MB",
    )
    assert remarks_of([stage()]) == ["targets: rank 2 (n1) has given no sign of life for 14 min 00 s"]
    error = LastError(time=0.0, rank=3, code=2, message="the disk is full: free some space")
    (remark,) = remarks_of([stage(ranks=(), state="failed", error=error)])
    assert re.fullmatch(
        r"targets: rank 3 ended at \S+ with exit code 2: the disk is full: free some space", remark
    )
    assert remarks_of([stage(ranks=(), state="killed")])[0].endswith("the same command continues")


def test_durations() -> None:
    seconds = (4, 61.4, 3600 + 5 * 60, 2 * 86400 + 4 * 3600)
    assert [duration(each) for each in seconds] == ["4 s", "1 min 01 s", "1 h 05 min", "2 d 04 h"]


def test_off_a_terminal_a_line_for_what_has_changed(capsys: pytest.CaptureFixture[str]) -> None:
    with open_screen() as show:
        show([stage(), stage(root=Path("run/keys"), name="keys", state="complete")], Path("run"), 10**9)
        show([stage(done=1300)], Path("run"), 10**9)
        show([stage(done=1300)], Path("run"), 10**9)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["targets:", "keys:", "targets:"]
    assert "done 1,300 of 4,800 units, rate 30.0 units/min, time left 2 h 00 min" in lines[2]
    assert "1.00 GB free" in lines[2] and "\x1b" not in "".join(lines)


def test_on_a_terminal_the_table_gets_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def table(columns: Sequence[str]) -> Iterator[Callable[..., None]]:
        yield lambda *arguments: drawn.append(arguments)

    monkeypatch.setattr("mlpmem_ds.stages.inspection.screen.open_table", table)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with open_screen() as show:
        show([stage(), stage(state="failed", ranks=())], Path("run"), 10**9)
    ((heading, rows, remarks),) = drawn
    assert heading.startswith("run   ") and "1.00 GB free" in heading
    assert rows == [(cells_of(stage()), "bold"), (cells_of(stage(state="failed", ranks=())), "red")]
    assert remarks == remarks_of([stage()])
