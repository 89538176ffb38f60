"""What a gate remembers of each sequence while text is generated, carried by the base's cache.

Place in the pipeline: the joint model (`hf`) reads and writes it in each forward, for gates with a history. A
history is an average over the tokens so far, so it belongs to a sequence as its keys and values do. It
therefore lies in the cache's own list of layers: whoever reorders the cache (beams), repeats it, selects from
it, crops it (assisted generation) or resets it does the same to the history, and a new cache begins without
one.

This file travels with exported models as remote code: it imports torch, transformers and the standard library
only.

Shapes: B sequences, S tokens, T positions that are kept for a crop, P models (the base, then the memories), V
vocabulary, H numbers of a history.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import cache_utils

from .gate_features import History

_ROWS = 1024
"""rows whose float32 logits are in memory at once: 0.5 GB at a vocabulary of 128 k"""

# A layer of this kind holds no keys and is passed over when masks are made; before transformers had it, every
# layer was one of attention, and only the first was looked at.
_Layer: Any = getattr(cache_utils, "DummyLayer", object)


class HistoryLayer(_Layer):
    """The state of each sequence of a cache after its last tokens, and what was predicted there.

    `states [B, T, H]` after each of the last T tokens, `logits`: P tensors `[B, T, V]` that were given
    there, from which the next token's log-probabilities are read when it comes, and `is_real [B, T]`, false
    for padding. T is 1, or the number of positions whose logits a forward was asked for, so that as many
    but one can be cropped.
    """

    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, *, in_place: bool) -> None:
        """`in_place`: the tensors keep their addresses, as CUDA graphs need it of a static cache."""
        self.is_initialized = True
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.in_place = in_place
        self.num_tokens = (
            0  # of the cache when this was written; 0 for a static one, whose length is a tensor
        )
        self.states: torch.Tensor | None = None
        self.logits: tuple[torch.Tensor, ...] = ()
        self.is_real: torch.Tensor | None = None

    def write(self, states: torch.Tensor, logits: tuple[torch.Tensor, ...], is_real: torch.Tensor) -> None:
        """Take what the next call continues from; gradients end here."""
        new = (states.detach(), is_real, *(values.detach() for values in logits))
        old = (
            None if self.states is None or self.is_real is None else (self.states, self.is_real, *self.logits)
        )
        if (
            self.in_place
            and old is not None
            and all(a.shape == b.shape for a, b in zip(old, new, strict=True))
        ):
            for place, values in zip(old, new, strict=True):
                place.copy_(values)
            return
        if self.in_place:
            new = tuple(values.clone() for values in new)
            if not torch.compiler.is_compiling():
                for values in new:
                    torch._dynamo.mark_static_address(values)
        self.states, self.is_real, self.logits = new[0], new[1], new[2:]

    def reset(self) -> None:
        """As a new cache: the next token is the first one."""
        self.num_tokens = 0
        if self.states is not None and self.is_real is not None:
            self.states.zero_()
            self.is_real.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back; the number is negative, as in transformers.

        Raises:
            ValueError: more than were kept.
        """
        count = abs(tokens_to_remove)
        if count == 0 or self.states is None or self.is_real is None:
            return
        num_kept = self.states.shape[1]
        if count >= num_kept:
            raise ValueError(
                f"the cache was cropped by {count} tokens, and the gate's history is kept for the last"
                f" {num_kept - 1}: give the whole text again with a new cache (a forward with logits_to_keep"
                " = n keeps it for the last n - 1); for assisted generation let the base be the assistant"
            )
        self.num_tokens = max(self.num_tokens - count, 0)
        self._change(lambda values: values[:, :-count])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i becomes a copy of sequence `beam_idx[i]`."""
        self._change(lambda values: values.index_select(0, beam_idx.to(values.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        self._change(lambda values: values.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """These sequences alone."""
        self._change(lambda values: values[indices.to(values.device)])

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.states is not None and self.is_real is not None:
            self.states, self.is_real = change(self.states), change(self.is_real)
            self.logits = tuple(change(values) for values in self.logits)


def history_layer(cache: Any) -> HistoryLayer | None:
    """The history of a cache before a forward; None where it is new.

    Raises:
        ValueError: the cache can carry none, or it holds tokens that no gate saw.
    """
    if cache is None:
        return None
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise ValueError(
            f"a gate with a history needs a cache with a list of layers, and {type(cache).__name__} has none:"
            " generate without a cache (use_cache=False), or set a gate without a history"
        )
    layer = next((layer for layer in layers if isinstance(layer, HistoryLayer)), None)
    if layer is not None and layer.in_place:
        return layer
    length = _length(cache)
    if length is not None and length != (0 if layer is None else layer.num_tokens):
        own = "no history" if layer is None else f"the history of {layer.num_tokens}"
        raise ValueError(
            f"the cache holds {length} tokens and {own}: other models or gates wrote it; give the whole"
            " text again with a new cache"
        )
    return layer


def carry(cache: Any, layer: HistoryLayer | None) -> HistoryLayer:
    """The history of a cache after the base's forward, when all other layers are there."""
    if layer is None:
        layer = HistoryLayer(in_place=bool(cache.is_compileable) and not _grows(cache))
        cache.layers.append(layer)
    length = None if layer.in_place else _length(cache)
    layer.num_tokens = length or 0
    return layer


def _grows(cache: Any) -> bool:
    return isinstance(cache, cache_utils.DynamicCache)


def _length(cache: Any) -> int | None:
    """Tokens in a cache; None where that cannot be known."""
    try:
        length = cache.get_seq_length()
    except ValueError:  # of a base without attention
        return None
    if isinstance(length, torch.Tensor):  # of a static cache; a compiler cannot read it
        return None if torch.compiler.is_compiling() else int(length)
    return int(length)


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
        first = [_chosen(values[:, -1:], ids_BS[:, :1])[:, 0] for values in layer.logits]
        first_BP = torch.stack([values.to(start_BH.device) for values in first], dim=-1)
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
