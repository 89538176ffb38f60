"""Layers of a cache that carry what a joint model remembers: they follow the cache, and refuse what is not
theirs."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation import utils as generation_utils

from mlpmem_ds.models.carried_layers import CarriedLayer, carried_layer, carry, last_of, num_followed

from .conftest import tiny_base


class Notes(CarriedLayer):
    what: ClassVar[str] = "note"
    owner: ClassVar[str] = "a reader"


def filled(*, in_place: bool = False) -> Notes:
    layer = Notes(in_place=in_place)
    layer.replace((torch.ones(2, 3, dtype=torch.bool), torch.arange(12.0).reshape(2, 3, 2)))
    return layer


def test_it_is_reordered_repeated_selected_cropped_and_reset() -> None:
    layer = filled()
    values = layer.tensors[1]
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.tensors[1], values[[1, 1]])
    layer.replace((torch.ones(2, 3, dtype=torch.bool), values))
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.tensors[1], values[[0, 0, 1, 1]])
    layer.batch_select_indices(torch.tensor([3, 0]))
    layer.crop(-2)
    assert torch.equal(layer.tensors[1], values[[1, 0], :1])
    with pytest.raises(ValueError, match="cropped by 1 tokens, and a reader's note is kept for the last 0"):
        layer.crop(-1)
    layer.reset()
    assert layer.tensors == () and layer.num_spare == 0


def test_in_place_tensors_keep_their_addresses() -> None:
    layer = filled(in_place=True)
    place = layer.tensors[1].data_ptr()
    layer.replace((torch.zeros(2, 3, dtype=torch.bool), torch.full((2, 3, 2), 7.0, requires_grad=True)))
    assert layer.tensors[1].data_ptr() == place and layer.tensors[1].unique().tolist() == [7.0]
    assert not layer.tensors[1].requires_grad
    layer.reset()
    assert layer.tensors[1].data_ptr() == place and not any(values.any() for values in layer.tensors)


@torch.no_grad()
def test_a_cache_holds_one_of_a_kind_and_it_must_know_all_tokens() -> None:
    base, ids_BS = tiny_base("llama"), torch.arange(3, 9)[None]
    assert carried_layer(None, Notes) is None and carried_layer(DynamicCache(), Notes) is None
    cache = base(ids_BS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the cache holds 6 tokens and no note"):
        carried_layer(cache, Notes)
    layer = carry(cache, None, Notes)
    assert layer.num_tokens == 6 and carried_layer(cache, Notes) is layer
    base(ids_BS[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="the cache holds 7 tokens and the note of 6"):
        carried_layer(cache, Notes)
    assert carry(cache, layer, Notes) is layer and layer.num_tokens == 7
    static = StaticCache(config=base.config, max_cache_len=9)
    base(ids_BS, past_key_values=static)
    assert carry(static, None, Notes).in_place
    with pytest.raises(ValueError, match="needs a cache with a list of layers, and object has none"):
        carried_layer(object(), Notes)


@torch.no_grad()
def test_generation_does_not_run_a_step_too_many_to_take_it_back() -> None:
    """As it does on Apple's GPUs with a cache that is returned: only what was kept can be cropped."""
    checks = getattr(generation_utils, "DeferredStopCheck", None)
    if checks is None:
        pytest.skip("this transformers looks at each step's end tokens at once")
    cache = tiny_base("llama")(torch.arange(3, 9)[None], use_cache=True).past_key_values
    assert checks.is_supported(torch.device("mps"), cache, True, False)
    carry(cache, None, Notes)
    assert not checks.is_supported(torch.device("mps"), cache, True, False)
    assert checks.is_supported(torch.device("mps"), cache, False, False)


def test_as_many_positions_are_kept_as_logits_were_asked_for() -> None:
    found = [num_followed(5, keep) for keep in (0, 1, 3, 9, torch.tensor([1, 2]))]
    assert found == [1, 1, 3, 5, 1]
    values = torch.arange(12).reshape(2, 6)
    assert torch.equal(last_of(values, 2), values[:, 4:]) and last_of(values, 6) is not None
