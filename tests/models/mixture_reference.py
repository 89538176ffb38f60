"""What generation with a joint model must give, found in a slow way of its own.

Every step's logits come from whole forwards of the base and of the memories on one sequence without padding
and without a cache, and are mixed by the definition; the library's processors are then called one by one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessor, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.mixture import GateInputs
from mlpmem_ds.models.pretrained_memory import PretrainedMemory

from ..joint_models import joined
from .carried_generation import padded, set_history_gate
from .conftest import PAD, tiny_base, tiny_memory

NEW, LAMBDA, LENGTHS = 8, 0.4, (3, 8, 5)
KINDS = ("one memory", "bank", "gate")
Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The mixture after a sequence; all memories must read outputs of layers before the last one."""

    joint: MemoryAugmentedLM
    seen: dict[Ids, list[torch.Tensor]] = field(default_factory=dict)

    def parts(self, ids: Ids) -> list[torch.Tensor]:
        """The logits [V] of the base and of each memory after these tokens."""
        if ids not in self.seen:
            base = self.joint.base
            self.take(ids, base(torch.tensor([ids]), output_hidden_states=True, use_cache=False), row=0)
        return self.seen[ids]

    def take(self, ids: Ids, output: Any, row: int) -> None:
        """Know the logits after these tokens from a row of a forward of the base."""
        config = self.joint.config
        layers = [config.input_layer, *(each["input_layer"] for each in config.further_memories)]
        states = [output.hidden_states[layer + 1][row, -1] for layer in layers]
        memories = zip(self.joint.memories, states, strict=True)
        self.seen[ids] = [
            output.logits[row, -1],
            *(memory.head(memory(state)) for memory, state in memories),
        ]

    def weights(self, ids: Ids) -> list[float]:
        """Of each memory; for a gate with a history token by token, as the history is defined."""
        gate: Any = self.joint.gate
        num_memories = len(self.joint.memories)
        if gate.history is None:
            return [gate() / num_memories] * num_memories
        history = gate.history.start()
        for at in range(1, len(ids)):
            log_p = [logits.double().log_softmax(-1)[ids[at]] for logits in self.parts(ids[:at])]
            history = gate.history.update(history, log_p[0], torch.stack(log_p[1:]))
        base, *memories = self.parts(ids)
        known = GateInputs(base_logits=base, memory_logits=tuple(memories), history=history)
        return gate(known).reshape(num_memories).tolist()

    def logits(self, ids: Ids) -> torch.Tensor:
        """[V]: log((1 - Σλ) p_base + Σ λ p_memory), with the log-sum-exp of the base's logits."""
        base, *memories = self.parts(ids)
        weights = self.weights(ids)
        mixed = math.log(1 - sum(weights)) + base.log_softmax(-1)
        for memory, weight in zip(memories, weights, strict=True):
            mixed = torch.logaddexp(mixed, math.log(weight) + memory.log_softmax(-1))
        return mixed + base.logsumexp(-1)

    def rows(self, ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
        """The logits [B, V] after each sequence, of its tokens that are no padding."""
        pairs = zip(ids_BS, mask_BS.bool(), strict=True)
        return torch.stack([self.logits(tuple(ids[is_real].tolist())) for ids, is_real in pairs])


@cache
def reference_of(kind: str) -> Reference:
    """On a tiny Llama, with one of KINDS of memories."""
    further = [
        PretrainedMemory(
            module=tiny_memory(seed=21, hidden_size=20),
            input_layer=2,
            input_point="layer_output",
            lmbda=None,
            vocabulary_sha256="",
            provenance={},
        )
    ]
    joint = joined(
        tiny_base("llama"),
        tiny_memory(),
        lmbda=LAMBDA,
        input_point=CapturePoint(layer=1, point="layer_output"),
        further=further if kind == "bank" else (),
    )
    if kind == "gate":
        set_history_gate(joint)
    return Reference(joint=joint)


@torch.no_grad()
def generate_by_hand(
    reference: Reference,
    ids_BS: torch.Tensor,
    mask_BS: torch.Tensor,
    *,
    num_new: int,
    processors: Sequence[LogitsProcessor] = (),
    do_sample: bool = False,
    ends: Sequence[int] = (),
    is_over: Callable[[Sequence[int]], bool] = lambda _: False,
) -> torch.Tensor:
    """Prompts and new tokens [B, ≤ S + num_new], as transformers gives them; the seed is the caller's.

    `is_over` says of a sequence whether it ends here, as `ends` do.
    """
    running_B = torch.ones(len(ids_BS), dtype=torch.bool)
    for _ in range(num_new):
        rows = reference.rows(ids_BS[running_B], mask_BS[running_B])
        scores_BV = rows.new_zeros((len(ids_BS), rows.shape[1]))
        scores_BV[running_B] = rows
        for processor in processors:
            scores_BV = processor(ids_BS, scores_BV)
        chosen_B = torch.multinomial(scores_BV.softmax(-1), 1)[:, 0] if do_sample else scores_BV.argmax(-1)
        ids_BS = torch.cat([ids_BS, torch.where(running_B, chosen_B, PAD)[:, None]], dim=1)
        mask_BS = torch.cat([mask_BS, torch.ones_like(mask_BS[:, :1])], dim=1)
        stopped_B = torch.isin(chosen_B, torch.tensor(ends, dtype=torch.long))
        stopped_B |= torch.tensor([is_over(row) for row in ids_BS.tolist()])
        running_B &= ~stopped_B
        if not running_B.any():
            break
    return ids_BS


class WholeForwards(PreTrainedModel, GenerationMixin):
    """The reference behind transformers' own `generate`, for beams: without a cache."""

    _supports_sdpa = True

    def __init__(self, reference: Reference) -> None:
        super().__init__(copy.deepcopy(reference.joint.base.config))
        self.reference = reference
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # generate asks for a device

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.reference.rows(input_ids, attention_mask)[:, None])


class Guidance(LogitsProcessor):
    """Guidance away from other prompts [B, S], from the reference's own forwards."""

    def __init__(self, reference: Reference, scale: float, ids_BS: torch.Tensor, num_given: int) -> None:
        self.reference, self.scale, self.ids_BS, self.num_given = reference, scale, ids_BS, num_given

    def __call__(self, ids_BS: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        away_BS = torch.cat([self.ids_BS, ids_BS[:, self.num_given :]], dim=1)
        away_BV = self.reference.rows(away_BS, torch.ones_like(away_BS)).log_softmax(-1)
        return self.scale * (scores_BV.log_softmax(-1) - away_BV) + away_BV


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Arguments of `generate`, and the processors that they stand for."""

    options: Mapping[str, Any]
    processors: Sequence[LogitsProcessor] = ()
    do_sample: bool = False
    ends: Sequence[int] = ()

    @property
    def num_copies(self) -> int:
        """Of each prompt, where sequences are sampled."""
        return int(self.options.get("num_return_sequences", 1))


def generate(model: Any, setting: Setting, **more: Any) -> Any:
    """By transformers, of three prompts of LENGTHS that are padded on the left."""
    ids_BS, mask_BS = padded(LENGTHS)
    torch.manual_seed(17)
    options = {
        "max_new_tokens": NEW,
        "do_sample": setting.do_sample,
        "pad_token_id": PAD,
        "eos_token_id": list(setting.ends) or None,
        **({"top_k": 0} if setting.do_sample else {}),
        **setting.options,
    }
    return model.generate(ids_BS, attention_mask=mask_BS, **options, **more)


def by_hand(reference: Reference, setting: Setting) -> torch.Tensor:
    """The same by the slow reference, without beams."""
    torch.manual_seed(17)
    ids_BS, mask_BS = (each.repeat_interleave(setting.num_copies, dim=0) for each in padded(LENGTHS))
    return generate_by_hand(
        reference,
        ids_BS,
        mask_BS,
        num_new=NEW,
        # Some remember what they saw, so that each run needs its own.
        processors=[
            each if isinstance(each, Guidance) else copy.deepcopy(each) for each in setting.processors
        ],
        do_sample=setting.do_sample,
        ends=setting.ends,
    )


@contextmanager
def base_alone(joint: MemoryAugmentedLM) -> Iterator[None]:
    """λ = 0 for a while."""
    gate = joint.gate
    joint.lmbda = 0.0
    try:
        yield
    finally:
        joint.lmbda = LAMBDA
        joint.set_gate(gate)


def assert_the_bases_at_zero(joint: MemoryAugmentedLM, setting: Setting, **more: Any) -> None:
    """At λ = 0 every token is the base's own."""
    with base_alone(joint):
        assert torch.equal(generate(joint, setting, **more), generate(joint.base, setting, **more))
