"""Batches on their way to the device that computes: copied ahead of the steps that take them.

Part of `train`. On a GPU a thread puts the next batches into pinned memory and copies them on a stream of
their own, while the steps before compute: the copy of batch b + 1 is queued before anything of step b is
waited for. On a CPU there is nothing to copy, and a batch is converted when its step comes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch

from mlpmem_ds.core.ahead import run_ahead, timed

_BATCHES_AHEAD = 2  # on the device, besides the one whose step is queued; and as many pinned buffers
_ALIGNMENT = 512  # bytes: of a tensor in a pinned buffer
Arguments: TypeAlias = list[tuple[Any, ...]]
Move = Callable[[Any], tuple[Any, ...]]


class Streams(Protocol):
    """A device that copies and computes at the same time."""

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] on the host, which the device can read by itself."""

    def copying(self, *, after_compute: bool) -> AbstractContextManager[None]:
        """What is queued inside goes on the stream of copies; `after_compute`: behind what the other stream
        has by now."""

    def mark(self) -> Any:
        """An event after all that was queued on the stream of copies."""

    def finish(self, event: Any) -> None:
        """The calling thread waits for an event."""

    def read(self, tensors: Sequence[torch.Tensor]) -> None:
        """What is queued on the stream of copies reads these tensors of the other stream; their memory is not
        used again before that is done. No thread waits."""

    def take(self, event: Any, tensors: Sequence[torch.Tensor]) -> None:
        """The stream that computes waits for an event; the tensors' memory is not used again before it is
        done with them. No thread waits."""


class CudaStreams:
    """A GPU's current stream, which computes, and one for copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._compute = torch.cuda.current_stream(device)
        self._copies = torch.cuda.Stream(device)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        with torch.cuda.device(self._device):  # else this thread would open GPU 0 as well
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    @contextlib.contextmanager
    def copying(self, *, after_compute: bool) -> Iterator[None]:
        if after_compute:
            self._copies.wait_stream(self._compute)
        with torch.cuda.device(self._device), torch.cuda.stream(self._copies):
            yield

    def mark(self) -> Any:
        event = torch.cuda.Event()
        event.record(self._copies)
        return event

    def finish(self, event: Any) -> None:
        event.synchronize()

    def read(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.record_stream(self._copies)

    def take(self, event: Any, tensors: Sequence[torch.Tensor]) -> None:
        self._compute.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(self._compute)


def streams_for(device: torch.device, *, may_run_ahead: bool) -> Streams | None:
    """Those of a GPU; None where a batch may not be taken before its step, or nothing is copied."""
    return CudaStreams(device) if device.type == "cuda" and may_run_ahead else None


@dataclass(eq=False)
class PinnedBuffer:
    """Host memory that one batch's tensors go through; it grows to the largest batch."""

    streams: Streams
    _memory: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    _event: Any = None

    def fill(self, parts: Sequence[Any]) -> list[Any]:
        """The parts with their host tensors in this buffer, once the copies of its last batch are done."""
        if self._event is not None:
            self.streams.finish(self._event)
        sizes = [_padded(tensor) for tensor in tensors_of(parts) if tensor.device.type == "cpu"]
        if sum(sizes) > len(self._memory):
            self._memory = self.streams.pinned(sum(sizes))
        place = 0

        def put(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal place
            if tensor.device.type != "cpu":
                return tensor
            memory = self._memory[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            place += _padded(tensor)
            return memory.copy_(tensor)

        return [map_tensors(part, put) for part in parts]

    def copied(self, event: Any) -> None:
        """After this event the buffer is free."""
        self._event = event


class DeviceFeed:
    """Brings batches to the device.

    Args:
        move: a micro-batch → a forward's arguments on the device; on a GPU without waiting, and without
            keeping any of the host memory that it is given.
        streams: of the device; None where nothing is copied ahead.
    """

    def __init__(self, move: Move, streams: Streams | None) -> None:
        self._move, self._streams = move, streams

    def stream(self, batches: Iterator[tuple[Sequence[Any], float]]) -> Iterator[tuple[Arguments, float]]:
        """Each batch's arguments, and the seconds that were waited for them.

        With `streams`, `batches` are taken by a thread, ahead of the steps.
        """
        if self._streams is None:
            for parts, seconds in batches:
                yield [self._move(part) for part in parts], seconds
            return
        brought = run_ahead(self._bring(batches), count=_BATCHES_AHEAD, name="copies")
        with contextlib.closing(brought):  # type: ignore[type-var]
            for (arguments, event), seconds in timed(brought):
                self._streams.take(event, list(tensors_of(arguments, device_only=True)))
                yield arguments, seconds

    def _bring(self, batches: Iterator[tuple[Sequence[Any], float]]) -> Iterator[tuple[Arguments, Any]]:
        """Each batch with its copies queued, and the event after them."""
        assert self._streams is not None
        buffers = deque(PinnedBuffer(self._streams) for _ in range(_BATCHES_AHEAD))
        with contextlib.ExitStack() as stack:
            stack.callback(_close, batches)
            for parts, _ in batches:
                buffers.rotate(-1)
                computed = list(tensors_of(parts, device_only=True))
                pinned = buffers[0].fill(parts)
                with self._streams.copying(after_compute=bool(computed)):
                    arguments = [self._move(part) for part in pinned]
                    event = self._streams.mark()
                # They belong to the other stream, which would write over them as soon as they are let go.
                self._streams.read(computed)
                buffers[0].copied(event)
                yield arguments, event


def tensors_of(value: Any, *, device_only: bool = False) -> Iterator[torch.Tensor]:
    """The tensors in lists, tuples and dataclasses, each once; those of a device alone if asked."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not (device_only and tensor.device.type == "cpu"):
            found.append(tensor)
        return tensor

    map_tensors(value, note)
    return iter(found)


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same lists, tuples and dataclasses with other tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, function) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value)]
        return dataclasses.replace(
            value, **{name: map_tensors(getattr(value, name), function) for name in names}
        )
    return value


def _padded(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _close(batches: Iterator[Any]) -> None:
    """A generator's own threads end with it."""
    close = getattr(batches, "close", None)
    if close is not None:
        close()
