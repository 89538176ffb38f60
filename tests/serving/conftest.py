"""Stand-ins for the few interfaces of vLLM that our plugin uses, so that it is tested where vLLM is not."""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mlpmem_ds.models.backbone import configured_transform
from mlpmem_ds.models.hf import MemoryAugmentedLM

_LOADED_BY_VLLM = ("vllm_slots", "vllm_model", "vllm_requests")
BLOCK_SIZE = 4
CONTEXT = SimpleNamespace(attn_metadata=None)
"""of the step that runs"""


class BaseOfEngine(nn.Module):
    """A transformers base in the form of vLLM's: the tokens of a step in a row, without a batch dimension."""

    def __init__(self, hf_config: Any) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_config(hf_config).eval()
        self.make_empty_intermediate_tensors = None
        self.num_heads_used = 0

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings()(input_ids)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, intermediate: Any, embeddings: Any
    ) -> Any:
        output = self.model.base_model(
            input_ids=input_ids[None], position_ids=positions[None], use_cache=False
        )
        return output.last_hidden_state[0]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.num_heads_used += 1
        return configured_transform(self.model)(self.model.get_output_embeddings()(hidden))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        values = dict(weights)
        self.model.load_state_dict(values)
        return set(values)


class BaseWithOutputs(BaseOfEngine):
    """One that hands over the outputs of layers, as bases of vLLM do for EAGLE-3."""

    layers: tuple[int, ...] = ()

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        self.layers = layers

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, intermediate: Any, embeddings: Any
    ) -> Any:
        output = self.model.base_model(
            input_ids=input_ids[None], position_ids=positions[None], output_hidden_states=True
        )
        states = [output.hidden_states[layer][0] for layer in sorted(self.layers)]
        return (output.last_hidden_state[0], states) if states else output.last_hidden_state[0]


class Loader:
    """As vLLM's AutoWeightsLoader: a part's own `load_weights`, else its parameters and buffers by name."""

    def __init__(self, module: nn.Module, *, ignore_unexpected_prefixes: Sequence[str] = ()) -> None:
        self._module, self._ignored = module, tuple(ignore_unexpected_prefixes)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        named = {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}
        base, loaded = [], set()
        for name, value in weights:
            if name.startswith("base."):
                base.append((name.removeprefix("base."), value))
            elif name in named:
                named[name].data.copy_(value)
                loaded.add(name)
            elif not name.startswith(self._ignored or ("-",)):
                raise ValueError(f"there is no parameter {name}")
        return loaded | {f"base.{name}" for name in self._module.base.load_weights(base)}


class Registry:
    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def get_supported_archs(self) -> set[str]:
        return {"LlamaForCausalLM", *self.models}

    def register_model(self, name: str, place: str) -> None:
        assert name not in self.models
        self.models[name] = place


class MetadataBuilder:
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        pass


class MoveDirectionality(enum.Enum):
    UNIDIRECTIONAL = 0
    SWAP = 1


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: Sequence[int]
    added: Sequence[tuple[int, Any, Any, Any]]
    moved: Sequence[tuple[int, int, MoveDirectionality]]


def stand_ins() -> dict[str, ModuleType]:
    """Module name → module."""
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"ModelRegistry": Registry()},
        "vllm.config": {"VllmConfig": SimpleNamespace},
        "vllm.sequence": {"IntermediateTensors": object},
        "vllm.forward_context": {"get_forward_context": lambda: CONTEXT},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.attention_layer_base": {"AttentionLayerBase": object},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.interfaces": {
            "supports_eagle3": lambda base: hasattr(base, "set_aux_hidden_state_layers")
        },
        "vllm.model_executor.models.utils": {
            "AutoWeightsLoader": Loader,
            "init_vllm_registered_model": lambda config, hf_config, prefix: config.base_class(hf_config),
            "maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name,
        },
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backend": {
            "AttentionBackend": object,
            "AttentionCGSupport": SimpleNamespace(NEVER=0),
            "AttentionMetadataBuilder": MetadataBuilder,
        },
        "vllm.v1.kv_cache_interface": {"HiddenStateCacheSpec": SimpleNamespace},
        "vllm.v1.sample": {},
        "vllm.v1.sample.logits_processor": {
            "BatchUpdate": BatchUpdate,
            "LogitsProcessor": object,
            "MoveDirectionality": MoveDirectionality,
        },
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, values in contents.items():
        vars(modules[name]).update(values)
    return modules


@pytest.fixture()
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Our files that vLLM loads, over the stand-ins; and its registry."""
    modules = stand_ins()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    names = [f"mlpmem_ds.serving.{name}" for name in _LOADED_BY_VLLM]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    loaded = {name.rpartition(".")[2]: importlib.import_module(name) for name in names}
    yield SimpleNamespace(**loaded, registry=modules["vllm"].ModelRegistry)
    for name in names:
        sys.modules.pop(name, None)


def engine_config(joint: MemoryAugmentedLM, **changes: Any) -> SimpleNamespace:
    """What vLLM would hand to the model of this export."""
    settings = {
        "enforce_eager": True,
        "base_class": BaseOfEngine,
        "pipeline_parallel_size": 1,
        "tensor_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "use_ubatching": False,
        "speculative_config": None,
        "kv_transfer_config": None,
        "kv_sharing_fast_prefill": False,
        **changes,
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=joint.config, enforce_eager=settings["enforce_eager"], dtype=torch.float32
        ),
        parallel_config=SimpleNamespace(**settings),
        speculative_config=settings["speculative_config"],
        kv_transfer_config=settings["kv_transfer_config"],
        cache_config=SimpleNamespace(
            block_size=BLOCK_SIZE, kv_sharing_fast_prefill=settings["kv_sharing_fast_prefill"]
        ),
        compilation_config=SimpleNamespace(static_forward_context={}),
        base_class=settings["base_class"],
    )
