"""Tensors on their way from a device to the host: the device goes on, and who uses them waits."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class HostCopies:
    """Copies of tensors through pinned memory; tensors of a CPU are themselves.

    They are queued on the current stream of each tensor's device, so behind what computes them; `wait` may be
    called from another thread.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = {name: _start_copy(tensor) for name, tensor in tensors.items()}
        devices = dict.fromkeys(tensor.device for tensor in tensors.values() if tensor.is_cuda)
        self._events = [_marked(device) for device in devices]

    def wait(self) -> dict[str, torch.Tensor]:
        """The tensors, when all of them are there."""
        for event in self._events:
            event.synchronize()
        return self._tensors


def _start_copy(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def _marked(device: torch.device) -> torch.cuda.Event:
    """An event after all that is queued on this device; who waits for it leaves the processor to others."""
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device that the host does not wait for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
