"""The layer of vLLM's cache that holds states of past tokens, over stand-ins of vLLM."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .conftest import CONTEXT


def layer_of(vllm: SimpleNamespace) -> tuple[Any, dict[str, Any]]:
    layers: dict[str, Any] = {}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    return vllm.vllm_slots.SlotLayer(config, name="slots.4", width=10, dtype=torch.bfloat16), layers


def test_vllm_is_told_of_a_layer_whose_size_is_that_of_what_is_kept(vllm: SimpleNamespace) -> None:
    layer, layers = layer_of(vllm)
    assert layers == {"slots.4": layer}
    config = SimpleNamespace(cache_config=SimpleNamespace(block_size=32))
    spec = layer.get_kv_cache_spec(config)
    assert vars(spec) == {"block_size": 32, "num_kv_heads": 1, "head_size": 10, "dtype": torch.bfloat16}


def test_full_graphs_are_not_supported(vllm: SimpleNamespace) -> None:
    """vLLM asks each backend, and takes piecewise graphs then."""
    builder = vllm.vllm_slots.SlotBackend.get_builder_cls()
    assert builder._cudagraph_support == vllm.vllm_slots.AttentionCGSupport.NEVER
    assert vllm.vllm_slots.SlotBackend.get_name()


def test_states_lie_in_the_cache_that_vllm_gives(vllm: SimpleNamespace) -> None:
    layer, _ = layer_of(vllm)
    layer.kv_cache = torch.zeros(3, 1, 4, 10)
    layer.states().write(torch.tensor([5]), torch.ones(1, 10))
    assert layer.kv_cache[1, 0, 1].sum() == 10


def test_a_step_is_that_of_the_layers_own_name(
    vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, _ = layer_of(vllm)
    for metadata, expected in ((None, None), ({}, None), ({"slots.4": 3, "others.0": 4}, 3)):
        monkeypatch.setattr(CONTEXT, "attn_metadata", metadata)
        assert layer.chunks() == expected


def test_a_graph_of_the_whole_model_is_refused(
    vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, _ = layer_of(vllm)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="--enforce-eager, or with --compilation-config .*PIECEWISE"):
        layer.chunks()
