"""An iterator run by a thread of its own, a few items ahead of who takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Any, TypeVar

Item = TypeVar("Item")
_END: Any = object()


def run_ahead(items: Iterator[Item], *, count: int, name: str) -> Iterator[Item]:
    """The items in order, made in one thread (called `name`), at most `count` before they are asked for.

    An error of the iterator is raised where its item would have come. When the items are taken to their end,
    or `close` is called, the iterator is closed and its thread ends.
    """
    with ThreadPoolExecutor(1, thread_name_prefix=name) as pool:
        pending: deque[Future[Item]] = deque()
        try:
            while True:
                while len(pending) <= count:
                    pending.append(pool.submit(next, items, _END))
                item = pending.popleft().result()
                if item is _END:
                    return
                yield item
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            close = getattr(items, "close", None)
            if close is not None:
                close()


def timed(items: Iterator[Item]) -> Iterator[tuple[Item, float]]:
    """Each item, and the seconds that were waited for it."""
    while True:
        start = perf_counter()
        item = next(items, _END)
        if item is _END:
            return
        yield item, perf_counter() - start
