"""The joint model in vLLM: any base of its registry, with the memories of an export as it is on disk.

vLLM runs `forward` on the tokens of a step, selects the rows that are to be sampled, and calls
`compute_logits`, where base and memories are mixed. What it gives is used as any model's logits: penalties,
constraints, samplers and log-probabilities follow. A memory of one position keeps no cache; what a gate's
history or a window needs of the tokens before lies next to the base's keys (`vllm_slots`): chunked prefill,
prefix caching and preemption need no more. A memory is replicated where the base is cut over GPUs.

The last state is there in any case. Outputs of layers come from the base itself where it can give them, as
for EAGLE-3; other states are read by hooks, which a compiled model does not call.

Shapes: T tokens of a step, R rows to sample, D width of the base, O numbers of a token's own part of a row, W
width of a row, V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.sequence import IntermediateTensors

from mlpmem_ds.models.gates import open_gate
from mlpmem_ds.models.hf_config import MemoryAugmentedConfig
from mlpmem_ds.models.joint_parts import checked_gate, described_memories, is_nothing
from mlpmem_ds.models.joint_step import BaseOnly, Step
from mlpmem_ds.models.logit_transform import LogitTransform
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.mixture import StoredGate
from mlpmem_ds.models.mixture_on_device import mixture_on_device
from mlpmem_ds.models.shared_head import SharedHead
from mlpmem_ds.serving.kept_logits import KeptLogits
from mlpmem_ds.serving.request_weights import STEP, RequestGate
from mlpmem_ds.serving.row_layout import RowLayout, layout_of
from mlpmem_ds.serving.row_past import RowPast
from mlpmem_ds.serving.state_hooks import StateHooks, layers_of
from mlpmem_ds.serving.vllm_slots import SlotLayer


class MemoryAugmentedLM(nn.Module):
    """A base of vLLM and its memories; the names of the parts are those of an export's weights."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Raises ValueError for an export, or settings of vLLM, with which the result would be another."""
        super().__init__()
        config: MemoryAugmentedConfig = vllm_config.model_config.hf_config
        memories = [MemoryConfig.from_dict(each["memory_config"]) for each in described_memories(config)]
        gate = checked_gate(open_gate(config.gate, config.lmbda), len(memories))
        self.config = config
        self.layout = layout_of(config, gate)
        _check_engine(vllm_config, self.layout)
        self.base = init_vllm_registered_model(
            vllm_config, hf_config=config.base_config, prefix=maybe_prefix(prefix, "base")
        )
        self.memory, *further = [self._with_head(Memory(each)) for each in memories]
        self.further_memories = nn.ModuleList(further)
        self.gate: StoredGate = gate
        self.make_empty_intermediate_tensors = self.base.make_empty_intermediate_tensors
        self._hooks = self._hook(is_eager=vllm_config.model_config.enforce_eager)
        self._kept = _kept_logits(vllm_config, gate)
        self._past = RowPast(
            layout=self.layout,
            history=gate.history,
            sampled=self._kept,
            models=[
                self._logits_of_base,
                *(partial(self._logits_of_memory, n) for n in range(len(memories))),
            ],
        )
        self.slots: SlotLayer | None = None
        if self.layout.reads_past:
            dtype = vllm_config.model_config.dtype
            self.slots = SlotLayer(
                vllm_config,
                name=maybe_prefix(prefix, f"slots.{config.num_hidden_layers}"),
                width=self._past.slot_width(dtype),
                dtype=dtype,
            )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.base.embed_input_ids(input_ids)
        return embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The rows [T, W] of `layout`."""
        output = self.base(input_ids, positions, intermediate_tensors, inputs_embeds)
        final_TD, outputs = output if isinstance(output, tuple) else (output, ())
        own_TO = self.layout.join(final_TD, [*self._hooks.take(), *outputs])
        return own_TO if self.slots is None else self._with_past(self.slots, own_TO, input_ids)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The mixture's logits [R, V] of rows [R, W], on the base's scale as in `models.hf`; the base's own
        where the weight of the memories is 0 for all rows."""
        lmbdas_R = STEP.take(len(hidden_states))
        final_RD, states, history_RH = self.layout.split(hidden_states)
        base_logits_RV: torch.Tensor | None = self.base.compute_logits(final_RD)
        if base_logits_RV is None or (lmbdas_R is None and is_nothing(self.gate)):
            return base_logits_RV
        gate = self.gate
        threshold: float | torch.Tensor | None = self.config.base_only_threshold
        if lmbdas_R is not None:
            num_memories = 1 + len(self.further_memories)
            gate = RequestGate(gate=gate, lmbdas_R=lmbdas_R, num_memories=num_memories)
            if threshold is not None:  # it is of the engine's own gate
                threshold = (lmbdas_R.isnan().double() * threshold)[:, None]
        mixed_RV, logits = self._step(gate, threshold).mix_with_parts(base_logits_RV, states, history_RH)
        if self._kept is not None:
            self._kept.keep(hidden_states, logits)
        return mixed_RV

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        # A fixed λ in the place of a learned gate leaves that one's weights over.
        ignored = [] if isinstance(self.gate, nn.Module) else ["gate."]
        loaded: set[str] = AutoWeightsLoader(self, ignore_unexpected_prefixes=ignored).load_weights(weights)
        return loaded

    def _step(self, gate: StoredGate, threshold: float | torch.Tensor | None) -> Step:
        return Step(
            memories=(self.memory, *self.further_memories),
            gate=gate,
            mixture=mixture_on_device,
            threshold=threshold,
            base_only=_NotCounted(),
        )

    def _with_past(self, slots: SlotLayer, own_TO: torch.Tensor, ids_T: torch.Tensor | None) -> torch.Tensor:
        if ids_T is None:
            raise ValueError(
                "a gate with a history or a memory with a window needs the tokens themselves: give prompts of"
                " tokens or text, and leave out --enable-prompt-embeds"
            )
        chunks = slots.chunks()
        if chunks is None:
            return self._past.begin(own_TO, ids_T)
        return self._past.extend(own_TO, ids_T, chunks, slots.states())

    def _logits_of_base(self, final: torch.Tensor, _: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = self.base.compute_logits(final)
        return logits

    def _logits_of_memory(
        self, number: int, _: torch.Tensor, states: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        return self._step(self.gate, None).logits_of_memory(number, states)

    def _with_head(self, memory: Memory) -> Memory:
        if isinstance(memory.head, SharedHead):
            memory.head = _BaseHead(self.base.compute_logits)
        return memory

    def _hook(self, *, is_eager: bool) -> StateHooks:
        """Let the base hand over the states of `layout.sources`, those by hooks first."""
        hooked = self.layout.sources
        outputs = [source for source in hooked if source.point == "layer_output"]
        if outputs and supports_eagle3(self.base):
            self.base.set_aux_hidden_state_layers(tuple(source.layer + 1 for source in outputs))
            hooked = tuple(source for source in hooked if source not in outputs)
        if not hooked:
            return StateHooks([], [])
        if not is_eager:
            raise ValueError(
                f"this memory reads {hooked[0].point} of layer {hooked[0].layer}, which a compiled model does"
                " not hand over: start vLLM with --enforce-eager, or train a memory on keys of extract_keys"
                " --input-point final_norm"
            )
        return StateHooks(
            layers_of(self.base, self.config.num_hidden_layers, self.config.layers_path), hooked
        )


class _BaseHead(SharedHead):
    """The output head of vLLM's base, as the base itself uses it: cut over GPUs, scaled, capped."""

    def __init__(self, compute_logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(LogitTransform())
        self._compute_logits = compute_logits

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._compute_logits(hidden)


class _NotCounted(BaseOnly):
    """A server has no one to tell how often the memory was left out."""

    def add(self, memory: Memory, num_rows: int, num_skipped: int) -> None:
        pass


def _kept_logits(vllm_config: VllmConfig, gate: StoredGate) -> KeptLogits | None:
    """None where there is no history, where a memory may be left out, whose logits are then not its own, and
    where ranks must all run the base's head, or none of them."""
    if gate.history is None or vllm_config.parallel_config.tensor_parallel_size > 1:
        return None
    config: MemoryAugmentedConfig = vllm_config.model_config.hf_config
    return KeptLogits() if config.base_only_threshold is None else None


def _check_engine(vllm_config: VllmConfig, layout: RowLayout) -> None:
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            "a base with a memory is not cut into pipeline stages: leave out --pipeline-parallel-size, and"
            " use --tensor-parallel-size"
        )
    if layout.reads_past:
        _check_past(vllm_config)
    if layout.sources and vllm_config.speculative_config is not None:
        raise ValueError(
            "speculative decoding hands the last state alone to its drafts, and this memory reads"
            f" {layout.sources[0].point} of layer {layout.sources[0].layer} too: leave out"
            " --speculative-config"
        )


def _check_past(vllm_config: VllmConfig) -> None:
    """Raises ValueError for what would lose the states of past tokens, or mix them up."""
    parallel = vllm_config.parallel_config
    refused = {
        "--speculative-config": vllm_config.speculative_config is not None,
        "--kv-transfer-config and --kv-offloading-size": vllm_config.kv_transfer_config is not None,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--enable-dbo and --ubatch-size": parallel.use_ubatching,
        # The layers behind those that share their cache run on the last token of a prompt alone.
        "--kv-sharing-fast-prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
    }
    for flags, is_given in refused.items():
        if is_given:
            raise ValueError(
                "this export's gate reads a history of past tokens, or its memory the states of several"
                f" positions, which are not kept with {flags}: leave that out"
            )
