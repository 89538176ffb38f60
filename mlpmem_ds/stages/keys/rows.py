"""Part of `extract_keys`: the states of a batch → its rows of the arrays on disk, made where the states are.

On a GPU only these rows leave it: a byte a number of the code and two of the memory's input, in place of two
float32 states. On a CPU NumPy makes the codes, as it makes those of every other stage.

n positions of a batch, D width of the base, E numbers of a key, I input size, G groups of an input's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.keys import INPUT_GROUP, Codec
from mlpmem_ds.maths.encoding import DeviceCodec, codec_on_device, encode_states, quantize_groups
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.stages.keys.codec import check_log_probabilities, refuse_infinite

ARRAYS = ("keys", "values", "log_probabilities", "inputs", "input_scales", "positions")
"""of a unit, in the order of its record; the last where not all positions have rows"""


@dataclass(frozen=True, kw_only=True)
class RowMaker:
    """What is made of the states `key` and `input` of a batch, where they are there.

    Called with states of any dtype and device, it gives, on the same device: `keys` and, by the input codec,
    `inputs` (bit patterns as int16) and `input_scales`, as they are stored; `clipped`, how many numbers of
    the keys were; `finite_key`, `finite_input`, bool [n]; `largest_key` [n] where float16 may not hold it.
    """

    codec: Codec
    input_codec: str
    _on_device: dict[torch.device, DeviceCodec] = field(default_factory=dict, repr=False, compare=False)

    @torch.no_grad()
    def __call__(self, states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows = {f"finite_{name}": torch.isfinite(state_nD).all(dim=1) for name, state_nD in states.items()}
        if "key" in states:
            rows |= self._key_rows(states["key"])
        if "input" in states:
            rows |= self._input_rows(states["input"])
        return rows

    def _key_rows(self, states_nD: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.codec.mean_D is None:
            return self._raw_rows(states_nD)
        if states_nD.device.type == "cpu":
            with np.errstate(invalid="ignore"):  # what is not finite is refused when the rows are taken
                codes_nE, num_clipped = self.codec.store(states_nD.float().numpy())
            return {"keys": torch.from_numpy(codes_nE), "clipped": torch.tensor(num_clipped)}
        codes, clipped = encode_states(states_nD, self._codec_on(states_nD.device))
        return {"keys": codes, "clipped": clipped}

    def _raw_rows(self, states_nD: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.codec.raw_dtype == "bfloat16":
            return {"keys": states_nD.to(torch.bfloat16).view(torch.int16)}
        largest_n1 = states_nD.gather(1, states_nD.abs().argmax(1, keepdim=True))
        return {"keys": states_nD.to(torch.float16), "largest_key": largest_n1.squeeze(1).float()}

    def _codec_on(self, device: torch.device) -> DeviceCodec:
        if device not in self._on_device:
            codec = self.codec
            assert codec.mean_D is not None and codec.rotation_DE is not None
            self._on_device[device] = codec_on_device(
                codec.mean_D, codec.rotation_DE, codec.scale, codec.massive, device
            )
        return self._on_device[device]

    def _input_rows(self, inputs_nI: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.input_codec == "int8":
            codes_nI, scales_nG = quantize_groups(inputs_nI, INPUT_GROUP)
            return {"inputs": codes_nI, "input_scales": scales_nG}
        return {"inputs": inputs_nI.to(torch.bfloat16).view(torch.int16)}


def stored_rows(
    rows: Mapping[str, torch.Tensor],
    log_probabilities_n: np.ndarray,
    positions_n: Sequence[int] | np.ndarray,
    points: Mapping[str, CapturePoint],
) -> dict[str, np.ndarray]:
    """The arrays among what `RowMaker`s made, as they are stored; all checked.

    Args:
        rows: on the CPU.
        log_probabilities_n: of the base.
        positions_n: of the rows.
        points: where `key` and `input` were read, for the messages.

    Raises:
        UserError: a number is not finite, or float16 cannot hold it.
    """
    for name in ("key", "input"):
        if f"finite_{name}" in rows:
            refuse_infinite(rows[f"finite_{name}"], positions_n, name, points[name])
    if "largest_key" in rows:
        _refuse_overflow(rows["keys"], rows["largest_key"], positions_n, points["key"])
    check_log_probabilities(log_probabilities_n, positions_n)
    arrays = {name: rows[name].numpy() for name in ARRAYS if name in rows}
    return {
        name: array.view(np.uint16) if array.dtype == np.int16 else array for name, array in arrays.items()
    }


def _refuse_overflow(
    keys_nD: torch.Tensor,
    largest_n: torch.Tensor,
    positions_n: Sequence[int] | np.ndarray,
    point: CapturePoint,
) -> None:
    fits_n = torch.isfinite(keys_nD).all(dim=1)
    if not bool(fits_n.all()):
        row = int((~fits_n).nonzero()[0])
        raise UserError(
            f"the key at position {int(positions_n[row])}, layer {point.layer} ({point.point}), holds"
            f" {float(largest_n[row]):,.6g}, beyond float16's 65,504: choose --raw-dtype bfloat16, or --codec"
            " int8, and another --output"
        )
