"""What a gate with a history remembers of each sequence while text is generated.

Place in the pipeline: the joint model (`hf`) reads and writes it in each forward. A history is an average
over the tokens so far; the base's cache carries it from call to call (`carried_layers`).

This file travels with exported models as remote code: it imports torch and the standard library only.

Shapes: B sequences, S tokens, T positions that are kept for a crop, P models (the base, then the memories), V
vocabulary, H numbers of a history.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch.nn import functional

from .carried_layers import CarriedLayer
from .gate_features import History

_ROWS = 1024
"""rows whose float32 logits are in memory at once: 0.5 GB at a vocabulary of 128 k"""


class HistoryLayer(CarriedLayer):
    """The state of each sequence of a cache after its last tokens, and what was predicted there.

    `states [B, T, H]` after each of the last T tokens, `log_probabilities`: P tensors, float32 `[B, T, V]`,
    that were given there, from which the next token's are read when it comes, so that no head runs twice,
    and `is_real [B, T]`, false for padding. T is 1, or the number of positions whose logits a forward was
    asked for, so that as many but one can be cropped.
    """

    what: ClassVar[str] = "history"
    owner: ClassVar[str] = "a gate"

    @property
    def is_real(self) -> torch.Tensor | None:
        return self.tensors[0] if self.tensors else None

    @property
    def states(self) -> torch.Tensor | None:
        return self.tensors[1] if self.tensors else None

    @property
    def log_probabilities(self) -> tuple[torch.Tensor, ...]:
        return self.tensors[2:]

    def write(
        self, states: torch.Tensor, log_probabilities: tuple[torch.Tensor, ...], is_real: torch.Tensor
    ) -> None:
        """Take what the next call continues from; gradients end here."""
        self.replace((is_real, states, *log_probabilities))


def token_log_probabilities(
    logits_of: Callable[[int, int], torch.Tensor], next_ids_BS: torch.Tensor
) -> torch.Tensor:
    """log p of the token that follows each of S positions, float32 `[B, S]`.

    Args:
        logits_of: `(start, stop) -> [B, stop - start, V]`, called on blocks of positions one after the other.
        next_ids_BS: the tokens that followed.
    """
    num_sequences, num_positions = next_ids_BS.shape
    step = max(1, _ROWS // max(num_sequences, 1))
    parts = [next_ids_BS.new_zeros((num_sequences, 0), dtype=torch.float32)]
    for start in range(0, num_positions, step):
        stop = min(start + step, num_positions)
        parts.append(_chosen(logits_of(start, stop), next_ids_BS[:, start:stop]))
    return torch.cat(parts, dim=1)


def _chosen(logits_BSV: torch.Tensor, ids_BS: torch.Tensor) -> torch.Tensor:
    """log softmax at the ids, float32 [B, S]."""
    logits_BSV = logits_BSV.float()
    ids_BS = ids_BS.to(logits_BSV.device)
    chosen_BS: torch.Tensor = logits_BSV.gather(-1, ids_BS[..., None])[..., 0]
    return chosen_BS - logits_BSV.logsumexp(dim=-1)


def states_of(
    layer: HistoryLayer | None,
    history: History,
    followed_BSP: torch.Tensor,
    ids_BS: torch.Tensor,
    is_real_BS: torch.Tensor,
) -> torch.Tensor:
    """The history at each of the S new tokens, that token included: `[B, S, H]`.

    A token counts where it and the one before it are no padding: only then was it predicted. After padding a
    history begins anew.

    Args:
        layer: what the calls before left; None or empty at the beginning.
        history: the gate's arithmetic.
        followed_BSP: log p of the tokens 1 to S - 1 `[B, S - 1, P]`, by each model at the token before.
        ids_BS: the new tokens.
        is_real_BS: false for padding.
    """
    start_BH = history.start(len(ids_BS), device=followed_BSP.device)
    if layer is not None and layer.states is not None and layer.is_real is not None:
        token_B1 = ids_BS[:, :1]
        first = [values[:, -1].gather(-1, token_B1.to(values.device)) for values in layer.log_probabilities]
        first_BP = torch.cat([values.to(start_BH.device) for values in first], dim=-1)
        updated_BH = history.update(layer.states[:, -1], first_BP[:, 0], first_BP[:, 1:])
        goes_on_B = layer.is_real[:, -1] & is_real_BS[:, 0]
        start_BH = torch.where(goes_on_B[:, None], updated_BH, start_BH)
    # What follows the last token is not known, and no state here knows it. At padding there may be NaN.
    counts_BS = functional.pad(is_real_BS[:, 1:] & is_real_BS[:, :-1], (0, 1))
    news_BSP = torch.where(counts_BS[..., None], functional.pad(followed_BSP, (0, 0, 0, 1)), 0.0)
    changes_BS = is_real_BS[:, 1:] != is_real_BS[:, :-1]
    segments_BS = torch.cat([torch.zeros_like(is_real_BS[:, :1]), changes_BS], dim=1).cumsum(dim=1)
    states_BSH, _ = history.along(news_BSP[..., 0], news_BSP[..., 1:], history=start_BH, segments=segments_BS)
    return torch.where(is_real_BS[..., None], states_BSH, 0.0)
