"""Copies to the host that are waited for late, with pretended GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mlpmem_ds.engines.host_copies import HostCopies, to_device


@dataclass(eq=False)
class PretendedTensor:
    """Of a GPU, with no content."""

    device: torch.device
    shape: tuple[int, ...] = (4, 2)
    dtype: torch.dtype = torch.int8
    is_cuda: bool = True


@dataclass
class Machine:
    """What was asked of CUDA, in order."""

    events: list[str] = field(default_factory=list)

    def empty(self, shape: Any, *, dtype: torch.dtype, pin_memory: bool) -> Any:
        assert pin_memory
        machine = self

        class Pinned:
            def copy_(self, source: PretendedTensor, *, non_blocking: bool) -> Pinned:
                assert non_blocking
                machine.events.append(f"copy from {source.device}")
                return self

        return Pinned()

    def event(self, *, blocking: bool) -> Any:
        assert blocking
        machine = self

        class Event:
            def record(self, stream: str) -> None:
                self.stream = stream
                machine.events.append(f"mark {stream}")

            def synchronize(self) -> None:
                machine.events.append(f"wait for {self.stream}")

        return Event()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(torch, "empty", machine.empty)
    monkeypatch.setattr(torch.cuda, "Event", machine.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    return machine


def test_copies_are_queued_and_waited_for_on_their_own_devices(machine: Machine) -> None:
    on_3, also_on_3, on_5 = (PretendedTensor(torch.device("cuda", number)) for number in (3, 3, 5))
    copies = HostCopies({"a": on_3, "b": also_on_3, "c": on_5})  # type: ignore[dict-item]
    assert machine.events == [
        "copy from cuda:3",
        "copy from cuda:3",
        "copy from cuda:5",
        "mark the stream of cuda:3",
        "mark the stream of cuda:5",
    ]
    assert list(copies.wait()) == ["a", "b", "c"]
    assert machine.events[5:] == ["wait for the stream of cuda:3", "wait for the stream of cuda:5"]


def test_tensors_of_the_host_are_themselves(machine: Machine) -> None:
    tensor = torch.arange(3)
    assert HostCopies({"a": tensor}).wait()["a"] is tensor and machine.events == []
    assert to_device(tensor, torch.device("cpu")) is tensor


def test_a_copy_to_a_gpu_goes_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tensor:
        def pin_memory(self) -> Tensor:
            self.is_pinned = True
            return self

        def to(self, device: torch.device, *, non_blocking: bool) -> tuple[torch.device, bool]:
            return device, self.is_pinned and non_blocking

    device = torch.device("cuda:7")
    assert to_device(Tensor(), device) == (device, True)  # type: ignore[arg-type, comparison-overlap]
