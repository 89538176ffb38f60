"""Part of `train_base`: what a base is trained for, the cross entropy of the next token.

B sequences, S tokens of a sequence, T = S + 1, N = B * S, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    rows = "tokens"
    sums = ()
    flops_per_row = 0.0

    def make_module(self) -> nn.Module:
        return NextTokenModule(self.model)

    def arguments(
        self, micro_batch: torch.Tensor, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor]:
        return (micro_batch.to(device),)


class NextTokenModule(nn.Module):
    """A causal language model whose forward is its loss, without ever holding all the logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def hidden(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """[B * S, D]: what the output head reads."""
        states = self.model.base_model(input_ids=tokens_BS, use_cache=False).last_hidden_state
        return states.reshape(-1, states.shape[-1])

    def forward(self, tokens_BT: torch.Tensor) -> tuple[torch.Tensor]:
        """The mean cross entropy (float32 scalar) of the tokens 1 … S of sequences of T = S + 1, int64."""
        labels_N = tokens_BT[:, 1:].reshape(-1)
        weight_VD = output_head(self.model)[0]
        loss, _ = sparse_loss(
            self.hidden(tokens_BT[:, :-1]),
            weight_VD,
            TargetBatch.from_labels(labels_N),
            alpha=0.0,
            chunk_bytes=_CHUNK_BYTES_CPU if weight_VD.device.type == "cpu" else DEFAULT_CHUNK_BYTES,
        )
        return (loss / len(labels_N),)
