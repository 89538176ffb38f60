"""Where in the base a hidden state is read.

This file travels with exported models as remote code: it imports the standard library only.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

Point = Literal["ffn_input", "layer_output", "final_norm"]
POINTS: tuple[str, ...] = get_args(Point)


@dataclass(frozen=True, kw_only=True)
class CapturePoint:
    """Where a hidden state is read.

    `layer` is an index into the decoder's layers, negative from the end. `point` is `ffn_input` (what that
    layer's MLP reads: the kNN-LM's key), `layer_output` (the residual stream after the layer) or `final_norm`
    (what the output head reads; it exists once, so its layer must be the last).

    With `earlier` layers the state is several in one: those of the earlier layers one after another, in this
    order, and that of `layer` as the last. They are read at the same point, or, where that is `final_norm`,
    at `layer_output`.

    `past` is for those who read a corpus position by position: the states of so many positions before stand
    in front (`past_states.with_past`). What reads whole sequences gives each position's own state.
    """

    layer: int
    point: Point = "ffn_input"
    earlier: tuple[int, ...] = ()
    past: int = 0

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise ValueError(f"a capture point must be one of {', '.join(POINTS)}, not {self.point!r}")
        object.__setattr__(self, "earlier", tuple(self.earlier))  # JSON has lists

    @classmethod
    def of(cls, settings: Any) -> "CapturePoint":
        """That of an object with `input_layer`, `input_point` and `input_earlier_layers`."""
        earlier = tuple(settings.input_earlier_layers)
        return cls(layer=settings.input_layer, point=settings.input_point, earlier=earlier)

    def settings(self) -> dict[str, Any]:
        """Those three, ready for JSON."""
        return {
            "input_layer": self.layer,
            "input_point": self.point,
            "input_earlier_layers": list(self.earlier),
        }

    @property
    def parts(self) -> "tuple[CapturePoint, ...]":
        """The points of one layer each whose states stand side by side in this one's."""
        point: Point = "layer_output" if self.point == "final_norm" else self.point
        before = (CapturePoint(layer=layer, point=point) for layer in self.earlier)
        return (*before, CapturePoint(layer=self.layer, point=self.point))
