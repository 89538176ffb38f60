"""One forward of a joint model: the base runs once, the memories read its states, a gate weighs them.

Place in the pipeline: the joint model (`hf`) makes a `JointForward` of its parts in each forward; what a gate
or a window needs of the tokens before is read from the base's cache, and written to it.

This file travels with exported models as remote code: it imports torch, transformers and the standard library
only.

Shapes: B sequences, S tokens, K kept positions, D width of the base, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from .backbone import Taps
from .carried_layers import carried_layer, carry
from .history_cache import HistoryLayer
from .joint_parts import is_nothing, kept_positions, real_tokens
from .joint_step import Step
from .window_cache import Windows


@dataclass(frozen=True, kw_only=True)
class JointForward:
    """The parts of a joint model that a forward needs."""

    base: PreTrainedModel
    parameters: frozenset[str]
    """names of the arguments of the base's forward"""
    taps: Taps
    windows: Windows
    step: Step

    def run(
        self, arguments: dict[str, Any], logits_to_keep: int | torch.Tensor, token_mask: torch.Tensor | None
    ) -> tuple[Any, torch.Tensor]:
        """The base's output for these arguments, and the joint model's logits [B, K, V] at the kept
        positions.

        Args:
            arguments: of the base's forward, but `logits_to_keep` and `return_dict`.
            logits_to_keep: which positions, by transformers' rule: the last ones (0: all), or indices.
            token_mask: bool [B, S], false for padding; None: `attention_mask` says it.

        Raises:
            ValueError: a gate with a history is not given the tokens, or it cannot be known which are
                padding.
        """
        gate = self.step.gate
        is_base_alone = is_nothing(gate)
        has_history = not is_base_alone and gate.history is not None
        # With a history the tokens are looked up in the logits of all positions.
        num_logits = 0 if has_history else logits_to_keep
        base_keeps = "logits_to_keep" in self.parameters
        if base_keeps:
            arguments["logits_to_keep"] = num_logits
        if is_base_alone:
            # A shortcut, not another way to mix: the memory need not run, and the logits stay as they are.
            output = self.base(**arguments, return_dict=True)
            return output, output.logits if base_keeps else kept_positions(output.logits, num_logits)
        ids_BS: Any = arguments.get("input_ids")
        if has_history and ids_BS is None:
            raise ValueError("a gate with a history reads the tokens themselves: give input_ids")
        new_BS = arguments["inputs_embeds"][..., 0] if ids_BS is None else ids_BS
        cache, is_real_BS = arguments.get("past_key_values"), None
        if has_history or self.windows.sizes:
            is_real_BS = real_tokens(new_BS, token_mask, arguments.get("attention_mask"))
        before = carried_layer(cache, HistoryLayer) if has_history else None
        forward = partial(self.taps.read, self.base, *new_BS.shape, **arguments, return_dict=True)
        output, states = self.windows.follow(forward, cache, is_real_BS, logits_to_keep, needs=num_logits)
        if is_real_BS is None or not has_history:
            base_logits_BKV = output.logits if base_keeps else kept_positions(output.logits, num_logits)
            states = {name: kept_positions(state_BSD, num_logits) for name, state_BSD in states.items()}
            return output, self.step.mix(base_logits_BKV, states)
        logits_BKV, tail = self.step.mix_and_follow(
            output.logits, states, ids_BS, is_real_BS, before, logits_to_keep
        )
        if output.get("past_key_values") is not None:
            tail.write_to(carry(output.past_key_values, before, HistoryLayer))
        return output, logits_BKV
