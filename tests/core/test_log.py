import logging
import time
from pathlib import Path

import pytest

from mlpmem_ds.core.host import boot_id, host_name
from mlpmem_ds.core.log import (
    EventLog,
    Progress,
    forget_begun,
    log_end,
    ranks_of_machine,
    ranks_of_stage,
    read_events,
    seconds_of_stage,
    set_up_logging,
)
from mlpmem_ds.core.world import World


def test_events_survive_a_line_cut_short(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log.jsonl", World(rank=1, size=2))
    log.write("unit", seconds=1.5)
    with open(tmp_path / "log.jsonl", "a") as stream:
        stream.write('{"event": "cut')
    events = read_events(tmp_path / "log.jsonl")
    assert [(event["event"], event["rank"], event["seconds"]) for event in events] == [("unit", 1, 1.5)]
    assert read_events(tmp_path / "none.jsonl") == []


def test_an_event_behind_a_line_that_was_cut_short_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a full disk leaves it: the next start is one, and the time until then no work."""
    path, log = tmp_path / "log.jsonl", EventLog(tmp_path / "log.jsonl", World())
    for event, moment in (
        ("started", 0.0),
        ("unit", 10.0),
        ("cut", 0.0),
        ("started", 1000.0),
        ("unit", 1005.0),
    ):
        if event == "cut":
            path.write_bytes(path.read_bytes() + b'{"time": 11.0, "ra')
            continue
        monkeypatch.setattr("mlpmem_ds.core.log.time.time", lambda moment=moment: moment)
        log.write(event)
    assert [event["event"] for event in read_events(path)] == ["started", "unit", "started", "unit"]
    assert seconds_of_stage(tmp_path) == 15.0
    assert path.read_bytes().count(b"\n") == 5


def test_no_flipped_bit_of_a_log_fails_its_readers(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for event in ("started", "unit", "finished"):
        EventLog(path, World()).write(event, seconds=1.5)
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        seconds = seconds_of_stage(tmp_path)
        assert seconds is None or 0 <= seconds < float("inf")
        for event in read_events(path):
            assert isinstance(event["event"], str) and isinstance(event["rank"], int)


def test_progress_speaks_in_plain_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (1, 0):  # the first last: it leaves the level that other tests expect
        set_up_logging(World(rank=rank, size=2), name="tool")
        progress = Progress(10, label="keys", unit="positions", world=World(rank=rank, size=2))
        progress.advance(10)
        progress.close()
    text = capsys.readouterr().err
    assert text.count("10 of 10 positions") == 1 and "tool rank 0" in text


def test_the_last_line_comes_once_and_only_where_something_was_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpmem_ds.core.log._SECONDS_BETWEEN_LINES", 0.0)
    set_up_logging(World(), name="tool")
    for total, amounts in ((9, []), (9, [4, 5]), (20, [7])):
        progress = Progress(total, label="keys", unit="positions", world=World())
        for amount in amounts:
            progress.advance(amount)
        progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ", 2)[2].split(" positions")[0] for line in lines] == [
        "4 of 9",
        "9 of 9",
        "7 of 20",
        "7 of 20",
    ]
    assert [" left" in line for line in lines] == [True, False, True, False]


def test_the_hubs_client_does_not_say_what_we_say() -> None:
    set_up_logging(World(), name="tool")
    for library in ("huggingface_hub.utils._http", "google.auth._default"):
        assert not logging.getLogger(library).isEnabledFor(logging.WARNING)
    assert not logging.getLogger("gcsfs.retry").isEnabledFor(logging.ERROR)  # it logs a traceback
    assert logging.getLogger("huggingface_hub").isEnabledFor(logging.ERROR)


def test_seconds_of_a_stage_count_overlapping_ranks_once_and_add_resumed_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(when: float, rank: int, event: str) -> None:
        monkeypatch.setattr(time, "time", lambda: when)
        EventLog(tmp_path / "log.jsonl", World(rank=rank, size=2)).write(event)

    assert seconds_of_stage(tmp_path) is None
    for when, rank, event in (
        (100, 0, "started"),
        (101, 1, "started"),
        (110, 0, "unit"),
        (115, 1, "finished"),
        (500, 0, "started"),
        (500.5, 1, "started"),
        (503, 1, "finished"),
        (507, 0, "finished"),
    ):
        write(when, rank, event)
    assert seconds_of_stage(tmp_path) == pytest.approx(15 + 7)


def test_the_ranks_of_a_stage_are_those_that_were_at_work_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(when: float, rank: int, event: str, **fields: object) -> None:
        monkeypatch.setattr(time, "time", lambda: when)
        EventLog(tmp_path / "log.jsonl", World(rank=rank, size=4)).write(event, **fields)

    assert ranks_of_stage(tmp_path) is None
    write(0, 0, "started")  # as an earlier program wrote it
    write(500, 0, "finished")
    assert ranks_of_stage(tmp_path) is None
    for begin, ranks, seconds in ((1000, 1, 60), (2000, 2, 40), (3000, 4, 1)):
        for rank in range(ranks):
            write(begin, rank, "started", world=ranks)
            write(begin + seconds, rank, "finished")
    assert ranks_of_stage(tmp_path) == 2


def test_the_ranks_of_a_machine_are_the_most_that_its_boot_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last start as so many ranks; containers of one machine are on one."""
    assert ranks_of_machine(tmp_path, 3) is None
    log = EventLog(tmp_path / "log.jsonl", World(rank=0, size=3))
    log.write("started", world=3)  # as an earlier program wrote it
    assert ranks_of_machine(tmp_path, 3) is None
    for moment, boots in ((0.0, ("a", "a", "b")), (1000.0, ("b", "b", "a"))):
        monkeypatch.setattr("mlpmem_ds.core.log.time.time", lambda moment=moment: moment)
        for rank, boot in enumerate(boots):
            log = EventLog(tmp_path / "log.jsonl", World(rank=rank, size=3, is_on_first_host=boot != "b"))
            log.begin(world=3, process=f"container-{rank} {boot} 12 345")
    log.begin(world=9, process="container-0 a 12 345")
    forget_begun()
    assert ranks_of_machine(tmp_path, 3) == 2 and ranks_of_machine(tmp_path, 9) == 1


def test_ranks_of_other_hosts_have_a_file_of_their_host(tmp_path: Path) -> None:
    """Appends of two clients of a network file system may overwrite each other."""
    for rank, is_first in ((0, True), (1, True), (2, False), (3, False)):
        EventLog(tmp_path / "log.jsonl", World(rank=rank, size=4, is_on_first_host=is_first)).write("started")
    assert {path.name for path in tmp_path.iterdir()} == {
        "log.jsonl",
        f"log-{host_name()}-{boot_id()}.jsonl",
    }
    assert [event["rank"] for event in read_events(tmp_path / "log.jsonl")] == [0, 1, 2, 3]
    assert seconds_of_stage(tmp_path) is not None


def test_an_end_is_noted_in_the_stage_that_it_ends(tmp_path: Path) -> None:
    forget_begun()
    log_end(2, "before any stage")
    outer, inner = (EventLog(tmp_path / f"{name}.jsonl", World()) for name in ("outer", "inner"))
    outer.begin(world=1)
    inner.begin(world=1)
    log_end(1, "in the inner stage")
    inner.finish(seconds=1.0)
    log_end(1, "in the outer stage")
    outer.finish(seconds=2.0)
    (tmp_path / "outer.jsonl").unlink()  # the stage gave up: its log is not made anew
    log_end(2, "after it")
    forget_begun()
    assert [path.name for path in tmp_path.iterdir()] == ["inner.jsonl"]
    messages = [event.get("message") for event in read_events(tmp_path / "inner.jsonl")]
    assert messages == [None, "in the inner stage", None]
