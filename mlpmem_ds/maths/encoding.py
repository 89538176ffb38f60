"""Pipeline: hidden states on a GPU → **rows of the keys on disk, made there**: int8 codes, int8 inputs.

The codes are those of the NumPy code in `formats.keys`, which a CPU runs: the same operations, in float32 and
in the same order. Only the product may round otherwise, so a number of a code may differ by one where it lies
on the edge between two. Nothing here waits for the device.

Shape legend: n positions, D width of the base, E numbers of a code, I input size, G groups of an input's
numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .codec import Array, MassiveDimension

_LARGEST_CODE = 127


@dataclass(frozen=True, kw_only=True)
class DeviceCodec:
    """The int8 codec of the keys on a device; `massive_M` of the dimensions that are clipped."""

    mean_D: Tensor
    rotation_DE: Tensor
    scale: Tensor
    massive_M: Tensor
    low_M: Tensor
    high_M: Tensor


def codec_on_device(
    mean_D: Array, rotation_DE: Array, scale: float, massive: Sequence[MassiveDimension], device: torch.device
) -> DeviceCodec:
    """The codec's arrays, copied there once."""

    def numbers(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return DeviceCodec(
        mean_D=torch.from_numpy(mean_D).to(device),
        rotation_DE=torch.from_numpy(rotation_DE).to(device),
        # On the device, because CUDA multiplies by the inverse of a number of the host.
        scale=torch.tensor(scale, dtype=torch.float32, device=device),
        massive_M=torch.tensor([entry.dimension for entry in massive], dtype=torch.int64, device=device),
        low_M=numbers([entry.low for entry in massive]),
        high_M=numbers([entry.high for entry in massive]),
    )


@torch.no_grad()
def encode_states(states_nD: Tensor, codec: DeviceCodec) -> tuple[Tensor, Tensor]:
    """int8 codes [n, E] of states of any dtype, and how many of their numbers were clipped (a scalar)."""
    states_nD = states_nD.float()
    if len(codec.massive_M):
        clipped_nM = states_nD.index_select(1, codec.massive_M).clamp(codec.low_M, codec.high_M)
        states_nD = states_nD.index_copy(1, codec.massive_M, clipped_nM)
    scaled_nE = ((states_nD - codec.mean_D) @ codec.rotation_DE / codec.scale).round()
    num_clipped = (scaled_nE.abs() > _LARGEST_CODE).sum()
    return scaled_nE.clamp(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8), num_clipped


@torch.no_grad()
def quantize_groups(inputs_nI: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """int8 codes [n, I] and float32 scales [n, G]: the greatest of each `group` numbers of a row is ±127."""
    num_rows, size = inputs_nI.shape
    grouped_nGg = pad(inputs_nI.float(), (0, -size % group)).view(num_rows, -1, group)
    largest = torch.full((), _LARGEST_CODE, dtype=torch.float32, device=inputs_nI.device)
    scales_nG = grouped_nGg.abs().amax(2) / largest
    divisors_nG1 = scales_nG.where(scales_nG > 0, 1.0).unsqueeze(2)
    codes_nGg = (grouped_nGg / divisors_nG1).round().clamp(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
    codes_nI = codes_nGg.view(num_rows, -1)
    return codes_nI if size % group == 0 else codes_nI[:, :size].contiguous(), scales_nG
