"""Which hidden states stand next to each other in a row that an engine samples from.

An engine runs the base on the tokens of many requests at once, selects the rows whose next token it needs,
and asks the model for their logits. Memories and a gate read states of other places of the base as well; they
stand behind the last state in the same row, so that the same rows of all are selected. So does what is
needed of the tokens before (`row_past`).

Shapes: `...` rows, D width of the base, O numbers of a token's own part of a row, W width of a row, H numbers
of a history.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf_config import MemoryAugmentedConfig
from mlpmem_ds.models.joint_parts import described_memories, input_name
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.mixture import Gate
from mlpmem_ds.models.structure import resolve_layer


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """A row: a token's own part, those of the tokens before that a window needs, the nearest first, and the
    gate's history. An own part is what the output head reads, then the states of `sources`, each of `width`
    numbers.

    `points` is what memories and gate read, by name, with layers counted from the front; `windows` are the
    names of those that are read at several positions, and at how many, the token's own as the last.
    """

    points: Mapping[str, CapturePoint]
    width: int
    windows: Mapping[str, int] = field(default_factory=dict)
    history_size: int = 0
    """H; 0: the gate reads none"""

    @property
    def past(self) -> int:
        """Tokens before whose own parts stand in a row."""
        return max(self.windows.values(), default=1) - 1

    @property
    def reads_past(self) -> bool:
        """Whether a row needs anything of the tokens before."""
        return bool(self.windows or self.history_size)

    @property
    def own_width(self) -> int:
        """O, where the last state is as wide as the others."""
        return self.width * (1 + len(self.sources))

    def history_width(self, dtype: torch.dtype) -> int:
        """Numbers of this dtype that a history takes in a row."""
        return self.history_size * torch.float32.itemsize // dtype.itemsize

    @property
    def sources(self) -> tuple[CapturePoint, ...]:
        """The points of one layer each that are read besides the last state, in the order of the row."""
        parts = {part: None for point in self.points.values() for part in point.parts}
        layers = [part for part in parts if part.point != "final_norm"]
        return tuple(sorted(layers, key=lambda part: (part.point, part.layer)))

    def join(self, final: torch.Tensor, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """The own parts [..., O] of the last state [..., D] and of the states of `sources`, of as many rows.

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

    def pack(self, history: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A history, float32 [..., H], bit by bit as numbers of the rows' dtype: it is not rounded."""
        return history.contiguous().view(dtype)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
        """From rows [..., W] the last state [..., D], contiguous; what is read, by name; and the history,
        float32 [..., H], of a gate that reads one."""
        history_width = self.history_width(rows.dtype)
        rows, packed = rows.split([rows.shape[-1] - history_width, history_width], dim=-1)
        own, *before = rows.chunk(1 + self.past, dim=-1)
        final, states = self._split_own(own)
        if self.windows:
            earlier = [self._split_own(each)[1] for each in before]
            for name, window in self.windows.items():
                parts = [each[name] for each in earlier[: window - 1]]
                states[name] = torch.cat([*reversed(parts), states[name]], dim=-1)
        return final, states, packed.contiguous().view(torch.float32) if history_width else None

    def _split_own(self, own: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sources = self.sources
        final_width = own.shape[-1] - len(sources) * self.width
        final, *others = own.split([final_width, *[self.width] * len(sources)], dim=-1)
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
    points, windows = {**gate.reads}, {}
    for number, described in enumerate(described_memories(config)):
        points[input_name(number)] = CapturePoint.of(SimpleNamespace(**described))
        windows[input_name(number)] = MemoryConfig.from_dict(described["memory_config"]).window
    return RowLayout(
        points={name: _from_the_front(point, count) for name, point in points.items()},
        width=config.hidden_size,
        windows={name: window for name, window in windows.items() if window > 1},
        history_size=0 if gate.history is None else gate.history.size,
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
