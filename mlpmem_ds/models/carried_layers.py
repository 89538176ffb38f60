"""What a joint model remembers of each sequence while text is generated, carried by the base's cache.

Place in the pipeline: `history_cache` (of a gate) and `window_cache` (of memories with a window) say what it
is; the joint model (`hf`) reads and writes it in each forward. It belongs to a sequence as its keys and
values do. It therefore lies in the cache's own list of layers: whoever reorders the cache (beams), repeats
it, selects from it, crops it (assisted generation) or resets it does the same to what is carried, and a new
cache begins without.

This file travels with exported models as remote code: it imports torch, transformers and the standard library
only.

Shapes: B sequences, T positions that are kept, `...` any further dimensions.
"""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from transformers import cache_utils

# A layer of this kind holds no keys and is passed over when masks are made; before transformers had it, every
# layer was one of attention, and only the first was looked at.
_Layer: Any = getattr(cache_utils, "DummyLayer", object)


class CarriedLayer(_Layer):
    """Tensors `[B, T, ...]` of the last positions of each sequence of a cache; the first says which of these
    are no padding, bool `[B, T]`."""

    is_compileable = True
    is_croppable = False  # not after each step: `generate` must not run one too many and take it back
    is_sliding = False
    supports_early_init = False
    what: ClassVar[str]
    """is carried, in messages"""
    owner: ClassVar[str]
    """needs it, in messages"""

    def __init__(self, *, in_place: bool) -> None:
        """`in_place`: the tensors keep their addresses, as CUDA graphs need it of a static cache."""
        self.is_initialized = True
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.in_place = in_place
        self.num_tokens = (
            0  # of the cache when this was written; 0 for a static one, whose length is a tensor
        )
        self.tensors: tuple[torch.Tensor, ...] = ()

    @property
    def num_spare(self) -> int:
        """Positions that can be cropped."""
        return self.tensors[0].shape[1] - 1 if self.tensors else 0

    def replace(self, new: tuple[torch.Tensor, ...]) -> None:
        """Take what the next call continues from; gradients end here."""
        new, old = tuple(values.detach() for values in new), self.tensors
        if self.in_place and old and all(a.shape == b.shape for a, b in zip(old, new, strict=True)):
            for place, values in zip(old, new, strict=True):
                place.copy_(values)
            return
        if self.in_place:
            new = tuple(values.clone() for values in new)
            if not torch.compiler.is_compiling():
                for values in new:
                    torch._dynamo.mark_static_address(values)
        self.tensors = new

    def reset(self) -> None:
        """As a new cache: the next token is the first one."""
        self.num_tokens = 0
        if not self.in_place:
            self.tensors = ()
        for values in self.tensors:
            values.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back; the number is negative, as in transformers.

        Raises:
            ValueError: more than were kept.
        """
        count = abs(tokens_to_remove)
        if count == 0 or not self.tensors:
            return
        if count > self.num_spare:
            raise ValueError(
                f"the cache was cropped by {count} tokens, and {self.owner}'s {self.what} is kept for the"
                f" last {self.num_spare}: give the whole text again with a new cache (a forward with"
                " logits_to_keep = n keeps it for the last n - 1); for assisted generation let the base be"
                " the assistant"
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
        self.tensors = tuple(change(values) for values in self.tensors)


L = TypeVar("L", bound=CarriedLayer)


def carried_layer(cache: Any, kind: type[L]) -> L | None:
    """The layer of this kind in a cache before a forward; None where it is new.

    Raises:
        ValueError: the cache can carry none, or it holds tokens that were not followed.
    """
    if cache is None:
        return None
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise ValueError(
            f"{kind.owner} with a {kind.what} needs a cache with a list of layers, and"
            f" {type(cache).__name__} has none: generate without a cache (use_cache=False), or leave out"
            f" the {kind.what}"
        )
    layer = next((layer for layer in layers if isinstance(layer, kind)), None)
    if layer is not None and layer.in_place:
        return layer
    length = _length(cache)
    if length is not None and length != (0 if layer is None else layer.num_tokens):
        own = f"no {kind.what}" if layer is None else f"the {kind.what} of {layer.num_tokens}"
        raise ValueError(
            f"the cache holds {length} tokens and {own}: other models or gates wrote it; give the whole"
            " text again with a new cache"
        )
    return layer


def carry(cache: Any, layer: L | None, kind: type[L]) -> L:
    """That layer of a cache after the base's forward, when all of its own layers are there."""
    if layer is None:
        layer = kind(in_place=bool(cache.is_compileable) and not _grows(cache))
        cache.layers.append(layer)
    length = None if layer.in_place else _length(cache)
    layer.num_tokens = length or 0
    return layer


def last_of(values: torch.Tensor, count: int) -> torch.Tensor:
    """The last positions, without keeping all of them in memory."""
    part = values[:, values.shape[1] - count :]
    return part if part.shape == values.shape else part.clone()


def num_followed(num_tokens: int, logits_to_keep: int | torch.Tensor) -> int:
    """Positions after which a call may go on: as many as its logits were asked for, so that all but one of
    these can be cropped; at least the last one."""
    return max(min(logits_to_keep, num_tokens), 1) if isinstance(logits_to_keep, int) else 1


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
