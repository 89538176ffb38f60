"""An iterator run ahead: order, how far, errors, and the end of its thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from mlpmem_ds.core.ahead import run_ahead, timed


def threads_of(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def test_items_come_in_order_from_one_thread_a_few_ahead() -> None:
    made: list[int] = []
    names = set()

    def items() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            names.add(threading.current_thread().name)
            yield number

    for number, item in enumerate(run_ahead(items(), count=3, name="ahead")):
        assert item == number and len(made) <= number + 5
    assert len(made) == 50 and len(names) == 1 and not threads_of("ahead")


def test_an_error_comes_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    stream = run_ahead(items(), count=5, name="ahead")
    assert next(stream) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(stream)
    assert not threads_of("ahead")


def test_leaving_early_closes_the_iterator() -> None:
    closed = []

    def items() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            closed.append(True)

    stream = run_ahead(items(), count=2, name="ahead")
    assert next(stream) == 0
    stream.close()  # type: ignore[attr-defined]
    assert closed == [True] and not threads_of("ahead")


def test_the_seconds_waited_for_an_item_are_its_own() -> None:
    def items() -> Iterator[str]:
        yield "at once"
        time.sleep(0.2)
        yield "late"

    found = []
    for item, seconds in timed(items()):
        time.sleep(0.3)  # what is done with an item is no waiting
        found.append((item, seconds >= 0.2))
    assert found == [("at once", False), ("late", True)]
    assert list(timed(iter([]))) == []
