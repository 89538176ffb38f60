"""Where in the base a hidden state is read.

This file travels with exported models as remote code: it imports the standard library only.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Point = Literal["ffn_input", "layer_output", "final_norm"]
POINTS: tuple[str, ...] = get_args(Point)


@dataclass(frozen=True, kw_only=True)
class CapturePoint:
    """Where a hidden state is read.

    `layer` is an index into the decoder's layers, negative from the end. `point` is `ffn_input` (what that
    layer's MLP reads: the kNN-LM's key), `layer_output` (the residual stream after the layer) or `final_norm`
    (what the output head reads; it exists once, so its layer must be the last).
    """

    layer: int
    point: Point = "ffn_input"

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise ValueError(f"a capture point must be one of {', '.join(POINTS)}, not {self.point!r}")
