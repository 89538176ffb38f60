"""Numbers of ours in vLLM's cache: one layer more, whose "keys" are what is kept of each token.

vLLM counts and allocates such a layer with the others, fills its block tables, and hands a step's tokens to
its "attention backend", which is the same whichever backend the base uses. That one supports no full CUDA
graphs, so that vLLM takes piecewise ones: Python runs in each step. vLLM itself keeps hidden states in this
way (its method `extract_hidden_states`).
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec

from mlpmem_ds.serving.slot_states import Chunks, SlotStates


class ChunksBuilder(AttentionMetadataBuilder):
    """Makes a step's `Chunks` of what vLLM tells all backends."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._block_size = kv_cache_spec.block_size

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Chunks:
        return Chunks(
            ends=common_attn_metadata.query_start_loc,
            lengths=common_attn_metadata.seq_lens,
            slots=common_attn_metadata.slot_mapping,
            blocks=common_attn_metadata.block_table_tensor,
            block_size=self._block_size,
            num_tokens=int(common_attn_metadata.query_start_loc_cpu[-1]),
        )


class SlotBackend(AttentionBackend):
    """Attends to nothing."""

    @staticmethod
    def get_name() -> str:
        return "MLPMEM_SLOTS"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[ChunksBuilder]:
        return ChunksBuilder


class SlotLayer(nn.Module, AttentionLayerBase):
    """The layer of vLLM's cache that holds `width` numbers of each token."""

    def __init__(self, vllm_config: VllmConfig, *, name: str, width: int, dtype: torch.dtype) -> None:
        """`name` has one number in it, by which vLLM orders its layers."""
        super().__init__()
        self._name, self._width, self._dtype = name, width, dtype
        self.kv_cache = torch.tensor([])  # vLLM puts its own here
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[SlotBackend]:
        return SlotBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        return HiddenStateCacheSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self._width,
            dtype=self._dtype,
        )

    def chunks(self) -> Chunks | None:
        """Of the step that runs; None where vLLM measures or warms up.

        Raises RuntimeError where what runs is recorded and run again without Python.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the whole model is recorded as a CUDA graph, and what is kept of past tokens is made outside"
                " of graphs: start vLLM with --enforce-eager, or with"
                """ --compilation-config '{"cudagraph_mode": "PIECEWISE"}'"""
            )
        metadata = get_forward_context().attn_metadata
        found: Chunks | None = (metadata or {}).get(self._name)
        return found

    def states(self) -> SlotStates:
        """What is kept: [blocks, slots of a block, width]."""
        return SlotStates(self.kv_cache[:, 0])
