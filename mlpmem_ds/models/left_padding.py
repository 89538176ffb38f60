"""Prompts of several lengths in one batch: padding on the left, and the models that must not have any.

Place in the pipeline: `generate`, `run_lm_eval`, `answer_questions` and the samples of `evaluate`.

Shapes: B prompts, S tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

_found: MutableMapping[Any, bool] = WeakKeyDictionary()
"""base → whether it reads padding: batch after batch asks"""


def padded_on_the_left(
    ids: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, S], and 0 where they are padding [B, S]."""
    length = max(map(len, ids))
    tokens = [[padding] * (length - len(row)) + list(row) for row in ids]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in ids]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def reads_padding(model: Any) -> bool:
    """Whether a language model, or the base of a joint one, reads tokens that the attention mask leaves out.

    Some that carry a state from token to token do (RWKV, xLSTM, RecurrentGemma), and none says so. So two
    texts are read that differ in masked tokens alone: where the mask is obeyed, the logits differ by rounding
    at most (of experts, whose products have other sizes), and tiny models of those three by a sixth and more.

    Such a model is to be given one prompt at a time: a step of RWKV's own (transformers 5.23) also mixes up
    the prompts of a batch. A model is looked at once.
    """
    base = getattr(model, "base", model)
    if base not in _found:
        _found[base] = _reads_masked_tokens(base)
    return _found[base]


@torch.no_grad()
def _reads_masked_tokens(base: Any) -> bool:
    if "attention_mask" not in inspect.signature(base.forward).parameters:
        return True
    mask_BS = torch.tensor([[0] * 8 + [1]], device=base.device)
    texts_BS = (torch.tensor([[*masked, 16]], device=base.device) for masked in (range(8), range(8, 16)))
    logits_BSV = [base(text_BS, attention_mask=mask_BS).logits for text_BS in texts_BS]
    first_V, second_V = (logits[0, -1].float() for logits in logits_BSV)
    rounding = torch.finfo(base.dtype).eps ** 0.5
    return not bool((first_V - second_V).norm() <= rounding * (first_V - first_V.mean()).norm())
