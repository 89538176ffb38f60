"""What a learned gate reads at a position, as a few numbers: how sure both distributions are, and how well
each of them predicted the tokens before.

*Confidences* are made from the logits of the position. A *history* is a state that follows the text:
averages, with weights that fall exponentially, of log(p_mem / p_base) and of log p_base of past tokens, 0 at
the start of a document or sequence. Generation updates it token by token, evaluation computes it over a whole
text; both by this file's arithmetic.

This file travels with exported models as remote code: it imports torch and the standard library only.

Shapes: `...` any leading dimensions, V vocabulary, M memories, C confidences, H numbers of a history, S
positions of a text, T positions of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_BASE_CONFIDENCES, _MEMORY_CONFIDENCES = 2, 4
_MAX_NATS = 20.0  # nats of a token in a history: one impossible token shall not blind a gate for a page
_CHUNK = 128  # positions of a text at once


def num_confidences(num_memories: int) -> int:
    """C, of a base and its memories."""
    return _BASE_CONFIDENCES + _MEMORY_CONFIDENCES * num_memories


def confidences(base_logits: torch.Tensor, memory_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 [..., C] from the logits [..., V] of a base and of each memory; see `join_confidences`."""
    rows = (base_logits, *memory_logits)
    return confidences_of([torch.log_softmax(logits.float(), dim=-1) for logits in rows])


def confidences_of(log_probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same from the log-probabilities [..., V] of the base and of each memory."""
    base, *memories = log_probabilities
    top, place = base.max(dim=-1)
    columns = []
    for memory in memories:
        greatest, at = memory.max(dim=-1)
        base_guess = memory.gather(-1, place[..., None])[..., 0]
        columns.append(torch.stack([_entropy(memory), greatest, (at == place).float(), base_guess], dim=-1))
    return join_confidences(torch.stack([_entropy(base), top], dim=-1), columns)


def join_confidences(base: torch.Tensor, memories: Sequence[torch.Tensor]) -> torch.Tensor:
    """[..., C] from [..., 2] of the base, entropy in nats and log-probability of its likeliest token, and
    [..., 4] of each memory: the same two, 1 where its likeliest token is the base's, and its log-probability
    of the base's likeliest token."""
    return torch.cat([base, *memories], dim=-1)


def _entropy(log_probabilities: torch.Tensor) -> torch.Tensor:
    """In nats; tokens without any probability count 0."""
    # Not torch's entr, which takes the logarithm again, in three times the time.
    finite = log_probabilities.clamp_min(torch.finfo(log_probabilities.dtype).min)
    return -(log_probabilities.exp() * finite).sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class History:
    """What a gate reads of past tokens, and the arithmetic that follows them.

    The state has H = M · R + B numbers: for each memory in turn the averages of log(p_mem / p_base) at the R
    `ratio_decays`, then those of log p_base at the B `base_decays`. An average at decay d moves by
    `d · state + (1 - d) · new`; what is new is limited to ±20 nats, and 0 where it is no number, as for a
    token that is impossible for both. A state stands *before* the token that is to be predicted: it knows the
    tokens up to the one that the position reads.
    """

    ratio_decays: tuple[float, ...] = (0.8, 0.95, 0.99)
    base_decays: tuple[float, ...] = (0.95,)
    num_memories: int = 1

    def __post_init__(self) -> None:
        if not all(0 <= decay < 1 for decay in (*self.ratio_decays, *self.base_decays)):
            raise ValueError(
                f"the decays of a history lie in [0, 1): {self.ratio_decays}, {self.base_decays}"
            )

    @property
    def size(self) -> int:
        """H."""
        return self.num_memories * len(self.ratio_decays) + len(self.base_decays)

    def start(self, *shape: int, device: torch.device | str | None = None) -> torch.Tensor:
        """The state of sequences that have not begun, float32 [*shape, H]."""
        return torch.zeros(*shape, self.size, device=device)

    def update(
        self, history: torch.Tensor, log_base: torch.Tensor, log_memories: torch.Tensor
    ) -> torch.Tensor:
        """The state after one token more, of history's dtype.

        Args:
            history: [..., H].
            log_base, log_memories: log-probabilities that base [...] and memories [..., M] gave to the token
                that followed.
        """
        decays_H = self._decays(history)
        news = self._news(log_base.to(history.dtype), log_memories.to(history.dtype))
        return decays_H * history + (1 - decays_H) * news

    def remaining(self, history: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        """What is left of states [..., H] after so many tokens more [...]; what these add is not in it."""
        return history * self._decays(history) ** num_tokens[..., None]

    def along(
        self,
        log_base: torch.Tensor,
        log_memories: torch.Tensor,
        *,
        history: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of all positions of a text at once: what `update` gives, one token after the other.

        Args:
            log_base: [..., S], floating: log-probability of the token that followed each position.
            log_memories: [..., S, M].
            history: [..., H] of the first position; default: zeros.
            segments: [..., S] whole numbers, the same over each document: it begins with zeros at each other
                number (of a document, of real text after padding). A given `history` belongs to the first.

        Returns:
            [..., S, H], before the token that follows each position, and [..., H], after the last.
        """
        news = self._news(log_base, log_memories)
        state = torch.zeros_like(news[..., 0, :]) if history is None else history.to(news.dtype)
        if segments is None:
            segments = torch.zeros(news.shape[:-1], dtype=torch.int64, device=news.device)
        last = segments[..., :1]
        found = []
        for start in range(0, news.shape[-2], _CHUNK):
            rows = slice(start, start + _CHUNK)
            own = segments[..., rows]
            before = self._in_chunk(news[..., rows, :], own, state, own == last)
            decays_H = self._decays(before)
            state = decays_H * before[..., -1, :] + (1 - decays_H) * news[..., rows, :][..., -1, :]
            last = own[..., -1:]
            found.append(before)
        return torch.cat(found, dim=-2), state

    def _in_chunk(
        self, news: torch.Tensor, segments: torch.Tensor, state: torch.Tensor, goes_on: torch.Tensor
    ) -> torch.Tensor:
        """[..., T, H]: each position's state, from those before it in its segment and, where the segment goes
        on from the chunk before, that chunk's last state [..., H]."""
        decays_H = self._decays(news)
        places_T = torch.arange(news.shape[-2], device=news.device)
        ages_TT = places_T[:, None] - places_T - 1
        weights_HTT = (1 - decays_H)[:, None, None] * decays_H[:, None, None] ** ages_TT.clamp_min(0)
        is_seen = (ages_TT >= 0) & (segments[..., :, None] == segments[..., None, :])
        chunk_part = (weights_HTT * is_seen[..., None, :, :]) @ news.transpose(-1, -2)[..., None]
        earlier_part = state[..., None, :] * decays_H ** places_T[:, None]
        return chunk_part[..., 0].transpose(-1, -2) + earlier_part * goes_on[..., None]

    def _news(self, log_base: torch.Tensor, log_memories: torch.Tensor) -> torch.Tensor:
        """[..., H]: what a token adds to each average."""
        # A NaN would stay for good, and in `along` reach the positions before it too: 0 · NaN is NaN.
        ratios = (log_memories - log_base[..., None]).nan_to_num().clamp(-_MAX_NATS, _MAX_NATS)
        base = log_base.nan_to_num().clamp_min(-_MAX_NATS)[..., None]
        shape = ratios.shape[:-1]
        return torch.cat(
            [
                ratios[..., None].expand(*ratios.shape, len(self.ratio_decays)).reshape(*shape, -1),
                base.expand(*shape, len(self.base_decays)),
            ],
            dim=-1,
        )

    def _decays(self, like: torch.Tensor) -> torch.Tensor:
        decays = self.ratio_decays * self.num_memories + self.base_decays
        return torch.tensor(decays, dtype=like.dtype, device=like.device)

    def settings(self) -> dict[str, Any]:
        """Plain values for a gate's settings."""
        return {"ratio_decays": list(self.ratio_decays), "base_decays": list(self.base_decays)}
