"""What `train_base` trains on and for: the train split cut into sequences, and their cross entropy.

B sequences, S tokens of a sequence, T = S + 1, N = B * S, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from mlpmem_ds.core.hashing import shuffled
from mlpmem_ds.maths.sparse_loss import DEFAULT_CHUNK_BYTES, TargetBatch, sparse_loss
from mlpmem_ds.models.backbone import output_head

_CHUNK_BYTES_CPU = 4 << 20  # of logits: what stays in a core's share of the cache


class BaseObjective(nn.Module):
    """A causal language model whose forward is its loss, without ever holding all the logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def hidden(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """[B * S, D]: what the output head reads."""
        states = self.model.base_model(input_ids=tokens_BS, use_cache=False).last_hidden_state
        return states.reshape(-1, states.shape[-1])

    def forward(self, tokens_BT: torch.Tensor) -> tuple[torch.Tensor]:
        """The mean cross entropy of the tokens 1 … S of sequences of T = S + 1."""
        labels_N = tokens_BT[:, 1:].reshape(-1)
        weight_VD = output_head(self.model)[0]
        loss, _ = sparse_loss(
            self.hidden(tokens_BT[:, :-1]),
            weight_VD,
            TargetBatch.of_labels(labels_N),
            alpha=0.0,
            chunk_bytes=_CHUNK_BYTES_CPU if weight_VD.device.type == "cpu" else DEFAULT_CHUNK_BYTES,
        )
        return (loss / len(labels_N),)


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The train split cut into sequences of S + 1 tokens, S apart; where the first starts changes with the
    epoch."""

    tokens: np.ndarray
    length: int
    seed: int

    @property
    def per_epoch(self) -> int:
        return (len(self.tokens) - self.length) // self.length

    def batch(self, epoch: int, first: int, count: int) -> np.ndarray:
        """int64 [count, S + 1]: the sequences [first, first + count) of the epoch's order."""
        offset = int(shuffled(self.length, self.seed, epoch, 1)[0])
        chosen = shuffled(self.per_epoch, self.seed, epoch, 0)[first : first + count]
        starts = np.minimum(offset + chosen * self.length, len(self.tokens) - self.length - 1)
        return self.tokens[starts[:, None] + np.arange(self.length + 1)]
