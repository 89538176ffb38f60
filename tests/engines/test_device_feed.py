"""Batches copied ahead: on a device that is played here, and straight through on a CPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_ds.engines.device_feed import DeviceFeed, map_tensors, streams_for, tensors_of
from mlpmem_ds.formats.training_rows import MicroBatch
from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.maths.sparse_targets import TargetBatch

CPU = torch.device("cpu")


class FakeStreams:
    """Notes what is asked of a device, in order; events end when the test says so."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.num_marks = 0
        self.changed = threading.Condition()

    def note(self, *entry: Any) -> None:
        with self.changed:
            self.log.append(entry)
            self.changed.notify_all()

    def wait_until(self, *entry: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: entry in self.log, timeout=10), (entry, self.log)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        self.note("pinned")
        return torch.full((num_bytes,), 255, dtype=torch.uint8)

    @contextlib.contextmanager
    def copying(self, *, after_compute: bool) -> Iterator[None]:
        self.after_compute = after_compute
        self.thread = threading.current_thread().name
        yield

    def mark(self) -> int:
        self.note("copied", self.num_marks)
        self.num_marks += 1
        return self.num_marks - 1

    def finish(self, event: int) -> None:
        self.note("finished", event)

    def read(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            self.note("read", id(tensor))

    def take(self, event: int, tensors: Sequence[torch.Tensor]) -> None:
        self.note("taken", event)


def make_batch(number: int, rows: int = 3) -> list[MicroBatch]:
    """One micro-batch whose numbers are all the batch's."""
    entries = SparseRows.from_counts(
        np.ones(rows, np.int64), np.full(rows, number, np.int32), np.full(rows, number, np.float32)
    )
    return [
        MicroBatch(
            inputs_NI=torch.full((rows, 4), number, dtype=torch.bfloat16),
            targets=TargetBatch.from_rows(entries, np.full(rows, number)),
        )
    ]


def move(part: MicroBatch) -> tuple[Any, ...]:
    """As `Imitation.arguments`; on a CPU a copy stands for that to the device."""
    return part.inputs_NI.to(torch.float32, copy=True), map_tensors(part.targets.to(CPU), torch.clone)


def batches(count: int) -> Iterator[tuple[list[MicroBatch], float]]:
    for number in range(count):
        yield make_batch(number, rows=3 + number % 2), 0.5


def check(arguments: Any, number: int) -> None:
    ((inputs, targets),) = arguments
    assert (inputs == number).all() and inputs.shape == (3 + number % 2, 4)
    assert (targets.ids == number).all() and (targets.labels_N == number).all()
    assert targets.offsets_N1.tolist() == list(range(4 + number % 2)) and targets.is_ascending


def test_the_next_batch_is_copied_before_anything_of_a_step_is_waited_for() -> None:
    """While step b is in the training's hands, and asks for nothing, the copy of b + 1 is queued."""
    streams = FakeStreams()
    for number, (arguments, _) in enumerate(DeviceFeed(move, streams).stream(batches(9))):
        streams.note("step", number)
        if number + 1 < 9:
            streams.wait_until("copied", number + 1)
        streams.note("flag read", number)
        check(arguments, number)
    for number in range(8):
        assert streams.log.index(("copied", number + 1)) < streams.log.index(("flag read", number))
        assert streams.log.index(("taken", number)) < streams.log.index(("step", number))
    assert streams.thread.startswith("copies") and not streams.after_compute


def test_a_buffer_is_written_again_only_after_its_copies() -> None:
    """Two buffers in turn; each grows once to the larger of its batches."""
    streams = FakeStreams()
    for number, (arguments, _) in enumerate(DeviceFeed(move, streams).stream(batches(12))):
        check(arguments, number)
    finished = [entry[1] for entry in streams.log if entry[0] == "finished"]
    assert finished == list(range(10))
    for number in range(10):
        assert streams.log.index(("finished", number)) < streams.log.index(("copied", number + 2))
    assert 2 <= streams.log.count(("pinned",)) <= 4


def test_a_cpu_takes_each_batch_when_its_step_comes() -> None:
    taken = []

    def counted() -> Iterator[tuple[list[MicroBatch], float]]:
        for number, batch in enumerate(batches(4)):
            taken.append(threading.current_thread())
            assert len(taken) == number + 1
            yield batch

    for number, (arguments, seconds) in enumerate(DeviceFeed(move, None).stream(counted())):
        check(arguments, number)
        assert len(taken) == number + 1 and seconds == 0.5
    assert set(taken) == {threading.main_thread()}


def test_errors_reach_the_training_and_leaving_ends_the_threads() -> None:
    def broken() -> Iterator[tuple[list[MicroBatch], float]]:
        yield from batches(2)
        raise ValueError("a sample is damaged")

    stream = DeviceFeed(move, FakeStreams()).stream(broken())
    with pytest.raises(ValueError, match="a sample is damaged"):
        list(stream)
    closed = []

    def endless() -> Iterator[tuple[list[MicroBatch], float]]:
        try:
            yield from batches(10**6)
        finally:
            closed.append(True)

    left = DeviceFeed(move, FakeStreams()).stream(endless())
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert closed == [True]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("copies")]


def test_inputs_that_were_computed_on_the_device_are_waited_for_and_not_pinned() -> None:
    streams = FakeStreams()
    (part,) = make_batch(1)
    computed = MicroBatch(inputs_NI=part.inputs_NI.to("meta"), targets=part.targets)
    feed = DeviceFeed(lambda found: (found.inputs_NI, found.targets), streams)
    ((arguments, _),) = feed.stream(iter([([computed], 0.0)]))
    assert arguments[0][0] is computed.inputs_NI and streams.after_compute


def test_inputs_that_are_converted_beside_the_steps_keep_their_memory_until_then() -> None:
    """A float32 training rounds nothing: what the base computed is widened on the stream of copies, and goes;
    the allocator would give its memory to the step that runs meanwhile."""
    streams = FakeStreams()
    (part,) = make_batch(1)
    computed = MicroBatch(inputs_NI=part.inputs_NI.to("meta"), targets=part.targets)
    feed = DeviceFeed(lambda found: (found.inputs_NI.float(), found.targets), streams)
    list(feed.stream(iter([([computed], 0.0), (make_batch(2), 0.0)])))
    held = ("read", id(computed.inputs_NI))
    assert [entry for entry in streams.log if entry[0] == "read"] == [held]  # and none of the host's
    assert streams.log.index(held) < streams.log.index(("taken", 0))


def test_tensors_are_found_in_records_lists_and_tuples() -> None:
    value = [(torch.tensor(1), "word"), make_batch(2)]
    assert len(list(tensors_of(value))) == 1 + 5
    doubled = map_tensors(value, lambda tensor: tensor * 2)
    assert doubled[0] == (torch.tensor(2), "word") and (doubled[1][0].inputs_NI == 4).all()
    assert list(tensors_of(value, device_only=True)) == []


def test_a_gpu_is_asked_for_its_own_streams_from_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda is played: which device each call is for, and which stream queues and waits."""
    log: list[Any] = []
    current: list[Any] = []

    class FakeStream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: FakeStream) -> None:
            log.append((self.name, "waits for", other.name))

        def wait_event(self, event: Any) -> None:
            log.append((self.name, "waits for the event of", event.stream))

    class FakeEvent:
        def record(self, stream: FakeStream) -> None:
            self.stream = stream.name

        def synchronize(self) -> None:
            log.append(("host", "waits for the event of", self.stream))

    @contextlib.contextmanager
    def inside(what: Any) -> Iterator[None]:
        current.append(what)
        yield
        current.pop()

    def pinned(num_bytes: int, **settings: Any) -> torch.Tensor:
        assert settings == {"dtype": torch.uint8, "pin_memory": True}
        log.append(("pinned", *current))
        return torch.zeros(num_bytes, dtype=torch.uint8)

    gpu = torch.device("cuda", 3)
    compute, copies = FakeStream("compute"), FakeStream("copies")
    monkeypatch.setattr(torch.cuda, "current_stream", {gpu: compute}.__getitem__)
    monkeypatch.setattr(torch.cuda, "Stream", {gpu: copies}.__getitem__)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "device", inside)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    streams = streams_for(gpu, may_run_ahead=True)
    assert streams is not None
    monkeypatch.setattr(torch, "empty", pinned)
    memory = streams.pinned(8)
    assert len(memory) == 8 and log == [("pinned", gpu)]
    with streams.copying(after_compute=True):
        assert current == [gpu, copies]
        event = streams.mark()
    with streams.copying(after_compute=False):
        pass
    streams.finish(event)
    kept: list[Any] = []
    tensor = SimpleNamespace(record_stream=kept.append)
    streams.read([tensor])  # type: ignore[list-item]
    streams.take(event, [tensor])  # type: ignore[list-item]
    assert kept == [copies, compute]
    assert log[1:] == [
        ("copies", "waits for", "compute"),
        ("host", "waits for the event of", "copies"),
        ("compute", "waits for the event of", "copies"),
    ]
    assert streams_for(gpu, may_run_ahead=False) is None and streams_for(CPU, may_run_ahead=True) is None
