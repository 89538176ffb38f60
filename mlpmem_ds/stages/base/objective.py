"""Part of `train_base`: what a base is trained for, the cross entropy of the next token.

B sequences, S predicted tokens of each, T = S + 1 and the begin tokens, N = B * S, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from mlpmem_ds.maths.sparse_loss import DEFAULT_CHUNK_BYTES, TargetBatch, sparse_loss
from mlpmem_ds.models.structure import output_head

_CHUNK_BYTES_CPU = 4 << 20  # of logits: what stays in a core's share of the cache


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """The objective of a base (`stages.training.parts.Objective`)."""

    model: PreTrainedModel
    num_begin_tokens: int = 0
    learnt_share: float = 1.0
    """of the text's tokens: below 1 where answers alone count"""

    rows = "tokens"
    sums = ()
    flops_per_row = 0.0

    def make_module(self) -> nn.Module:
        return NextTokenModule(
            self.model, num_begin_tokens=self.num_begin_tokens, learnt_share=self.learnt_share
        )

    def arguments(
        self, micro_batch: torch.Tensor, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor]:
        return (micro_batch.to(device),)


class NextTokenModule(nn.Module):
    """A causal language model whose forward is its loss, without ever holding all the logits.

    `num_begin_tokens` stand before each sequence, and no loss is taken of what follows each but the last. Nor
    is it of tokens that come as their complements (`MappedTokens`): where the text has such, `learnt_share`
    is below 1, and the loss is divided by the number of others that is expected, so that each of them weighs
    the same in any batch.
    """

    def __init__(
        self, model: PreTrainedModel, *, num_begin_tokens: int = 0, learnt_share: float = 1.0
    ) -> None:
        super().__init__()
        self.model, self._num_begin_tokens = model, num_begin_tokens
        self._learnt_share = learnt_share

    def hidden(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """[B, S, D]: what the output head reads."""
        states: torch.Tensor = self.model.base_model(input_ids=tokens_BS, use_cache=False).last_hidden_state
        return states

    def forward(self, tokens_BT: torch.Tensor) -> tuple[torch.Tensor]:
        """The mean cross entropy (float32 scalar) of the last S tokens of sequences, int64."""
        start, weights_N = self._num_begin_tokens, None
        if self._learnt_share < 1:
            weights_N = (tokens_BT[:, start + 1 :] >= 0).reshape(-1).float()
            tokens_BT = torch.where(tokens_BT < 0, ~tokens_BT, tokens_BT)
        labels_N = tokens_BT[:, start + 1 :].reshape(-1)
        weight_VD = output_head(self.model)[0]
        hidden_BSD = self.hidden(tokens_BT[:, :-1])[:, start:]
        loss, _ = sparse_loss(
            hidden_BSD.reshape(-1, hidden_BSD.shape[-1]),
            weight_VD,
            replace(TargetBatch.from_labels(labels_N), row_weights_N=weights_N),
            alpha=0.0,
            chunk_bytes=_CHUNK_BYTES_CPU if weight_VD.device.type == "cpu" else DEFAULT_CHUNK_BYTES,
        )
        return (loss / (len(labels_N) * self._learnt_share),)
