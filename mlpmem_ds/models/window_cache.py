"""The states of the positions before, for memories with a window, in sequences that are padded or generated.

Place in the pipeline: the joint model (`hf`) makes of a forward's states what such memories read: the states
of W positions, a position's own as the last. Before the first token of a text, and before padding, there is
nothing: zeros, as in the training (`past_states`). The last states of each sequence are carried to the next
call by the base's cache.

This file travels with exported models as remote code: it imports torch and the standard library only.

Shapes: B sequences, S tokens, P = W - 1 positions before, I numbers of a position's own state, T positions
that are kept for the next call.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .carried_layers import CarriedLayer, carried_layer, carry, last_of, num_followed

States = Mapping[str, torch.Tensor]


class WindowLayer(CarriedLayer):
    """The states of the last positions of each sequence, `[B, T, I]` of each memory with a window, and which
    are no padding. T is P, of the longest window, and as many more as can be cropped."""

    what: ClassVar[str] = "window"
    owner: ClassVar[str] = "a memory"

    def __init__(self, *, in_place: bool) -> None:
        super().__init__(in_place=in_place)
        self.past = 0

    @property
    def num_spare(self) -> int:
        return self.tensors[0].shape[1] - self.past if self.tensors else 0


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The memories with a window: the name of the state that each reads → its W."""

    sizes: Mapping[str, int]

    @property
    def past(self) -> int:
        """P of the longest one."""
        return max(1, *self.sizes.values()) - 1 if self.sizes else 0

    def follow(
        self,
        forward: Callable[[], tuple[Any, dict[str, torch.Tensor]]],
        cache: Any,
        is_real_BS: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        *,
        needs: int | torch.Tensor = 0,
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """A forward's output, and its states with those of the windows [B, S, W I] in place of the own ones.

        Args:
            forward: of the base; gives its output and the states of the new positions [B, S, I], by name.
            cache: that goes into it, or None; the one that comes out carries the last states.
            is_real_BS: false for padding; needed where there is a window.
            logits_to_keep: of the forward: so many positions but one can be cropped afterwards.
            needs: as `logits_to_keep`: the windows of these positions are needed; where it says how many of
                the last, those of the others are not made.
        """
        if not self.sizes:
            return forward()
        assert is_real_BS is not None
        before = carried_layer(cache, WindowLayer)
        output, states = forward()
        count = needs if isinstance(needs, int) and needs else is_real_BS.shape[1]
        read, carried = self._read(states, is_real_BS, () if before is None else before.tensors, count)
        if (cache := output.get("past_key_values")) is not None:
            num_kept = self.past + num_followed(is_real_BS.shape[1], logits_to_keep) - 1
            layer = carry(cache, before, WindowLayer)
            layer.past = self.past
            layer.replace(tuple(last_of(values, num_kept) for values in carried))
        return output, read

    def _read(
        self, states: States, is_real_BS: torch.Tensor, stored: tuple[torch.Tensor, ...], count: int
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """The states with the windows of the last `count` positions; and padding and own states [B, P + S,
        ...], P of the calls before."""
        start = is_real_BS.new_zeros((len(is_real_BS), self.past))
        before = stored[0][:, -self.past :].to(start) if stored else start
        is_real = torch.cat([before, is_real_BS], dim=1)
        read, carried = dict(states), [is_real]
        for number, (name, window) in enumerate(self.sizes.items(), start=1):
            state_BSI = states[name]
            start = state_BSI.new_zeros((len(state_BSI), self.past, state_BSI.shape[-1]))
            before = stored[number][:, -self.past :].to(start) if stored else start
            extended = torch.cat([before, state_BSI], dim=1)
            read[name] = with_window(
                extended, is_real.to(state_BSI.device), window, min(count, state_BSI.shape[1])
            )
            carried.append(extended)
        return read, carried


def with_window(states: torch.Tensor, is_real: torch.Tensor, window: int, num_positions: int) -> torch.Tensor:
    """Of each of the last positions the states of its window, the oldest first: [B, S, W I].

    Args:
        states: of at least P positions more [B, ≥ P + S, I].
        is_real: bool, of the same positions; a state counts where no padding stands between it and the
            position.
        window: W.
        num_positions: S.
    """
    count, first = states.shape[1], states.shape[1] - num_positions
    parts = [states[:, first:]]
    counts = is_real[:, first:]
    for steps in range(1, window):
        place = slice(first - steps, count - steps)
        counts = counts & is_real[:, place]
        parts.append(torch.where(counts[..., None], states[:, place], 0.0))
    return torch.cat(parts[::-1], dim=-1)
