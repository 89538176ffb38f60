"""Which hidden states stand next to each other in a row that an engine samples from.

An engine runs the base on the tokens of many requests at once, selects the rows whose next token it needs,
and asks the model for their logits. Memories and a gate read states of other places of the base as well; they
stand behind the last state in the same row, so that the same rows of all are selected.

Shapes: `...` rows, D width of the base, W width of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf_config import MemoryAugmentedConfig
from mlpmem_ds.models.joint_parts import described_memories, input_name
from mlpmem_ds.models.mixture import Gate
from mlpmem_ds.models.structure import resolve_layer


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """A row: what the output head reads, then the states of `sources`, each of `width` numbers.

    `points` is what memories and gate read, by name, with layers counted from the front.
    """

    points: Mapping[str, CapturePoint]
    width: int

    @property
    def sources(self) -> tuple[CapturePoint, ...]:
        """The points of one layer each that are read besides the last state, in the order of the row."""
        parts = {part: None for point in self.points.values() for part in point.parts}
        layers = [part for part in parts if part.point != "final_norm"]
        return tuple(sorted(layers, key=lambda part: (part.point, part.layer)))

    def join(self, final: torch.Tensor, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """The rows [..., W] of the last state [..., D] and of the states of `sources`, of as many rows.

        Raises RuntimeError for another number of states: `split` would cut them at wrong places.
        """
        if not self.sources:
            return final
        if len(states) != len(self.sources):
            sources = ", ".join(f"{source.point} of layer {source.layer}" for source in self.sources)
            raise RuntimeError(
                f"the engine's base handed over {len(states)} inner states, and {len(self.sources)} are read"
                f" ({sources}): this version of the engine is not supported with this memory; train one on"
                " keys of extract_keys --input-point final_norm"
            )
        return torch.cat((final, *(state.reshape(*final.shape[:-1], -1) for state in states)), dim=-1)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """From rows [..., W] the last state [..., D], contiguous, and what is read, by name."""
        sources = self.sources
        final_width = rows.shape[-1] - len(sources) * self.width
        final, *others = rows.split([final_width, *[self.width] * len(sources)], dim=-1)
        final = final.contiguous()
        found = dict(zip(sources, others, strict=True))
        states = {
            name: torch.cat([found.get(part, final) for part in point.parts], dim=-1)
            for name, point in self.points.items()
        }
        return final, states


def layout_of(config: MemoryAugmentedConfig, gate: Gate) -> RowLayout:
    """The layout for the memories of this configuration and their gate.

    Raises ValueError for a layer that the base does not have, and for `final_norm` before the last one.
    """
    count = config.num_hidden_layers
    points = {**gate.reads}
    for number, described in enumerate(described_memories(config)):
        points[input_name(number)] = CapturePoint.of(SimpleNamespace(**described))
    return RowLayout(
        points={name: _from_the_front(point, count) for name, point in points.items()},
        width=config.hidden_size,
    )


def check_single_positions(memories: Sequence[Any], gate: Gate) -> None:
    """Raises ValueError for what needs more than the states of one position: an engine gives no others.

    `memories` are the `MemoryConfig` of each.
    """
    if gate.history is not None:
        raise ValueError(
            "this export's gate reads a history of past tokens, which the engine does not keep: fit one"
            " without (fit_gate --kind confidences), or serve with a fixed weight"
            """ (--hf-overrides '{"gate": {"kind": "constant"}, "lmbda": 0.25}')"""
        )
    windows = [memory.window for memory in memories if memory.window > 1]
    if windows:
        raise ValueError(
            f"this export's memory reads the states of {windows[0]} positions (train --window"
            f" {windows[0]}), and the engine gives that of one: train a memory with --window 1"
        )


def _from_the_front(point: CapturePoint, count: int) -> CapturePoint:
    layer = resolve_layer(point.layer, count)
    if point.point == "final_norm" and layer != count - 1:
        raise ValueError(
            f"final_norm is read after the last layer, not at layer {point.layer} of {count}: config.json is"
            " damaged; export the memory again"
        )
    earlier = tuple(resolve_layer(each, count) for each in point.earlier)
    return CapturePoint(layer=layer, point=point.point, earlier=earlier)
