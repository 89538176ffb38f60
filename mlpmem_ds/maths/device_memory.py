"""Part of a search on a GPU: arrays on a device, and how much of its memory a search may take."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = np.ndarray[Any, Any]

_TILES = 16
"""tiles in what is free: eight threads may search at once, and leave half"""
_HOST_TILE_BYTES = 1 << 28


def on_device(array: Any, device: torch.device) -> Tensor:
    """A tensor of an array on the device; read-only arrays (memory maps) are copied."""
    if isinstance(array, Tensor):
        return array.to(device)
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)


def free_bytes(device: torch.device) -> int:
    """Of a GPU: what is free, and what torch keeps of it without using it."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether keys of so many bytes may stay on a device: in half of what is free on a GPU."""
    return device.type != "cuda" or num_bytes <= free_bytes(device) // 2


def tile_bytes(device: torch.device) -> int:
    """What a tile of distances may take on a device, with all that is made of it."""
    return free_bytes(device) // _TILES if device.type == "cuda" else _HOST_TILE_BYTES
