"""Training only: the end of a base, frozen: what stands between the memory's inputs and the base's logits.

An objective that needs the base's whole distribution has it from the memory's own inputs, where these are the
last layer's output or the state behind the final norm: the base itself need not run.

It is no `nn.Module`, so that ZeRO neither cuts nor saves it: each rank holds it whole, V · D numbers in the
dtype that the training computes in.

Shapes: N rows, I input size, D width of the base, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mlpmem_ds.maths.based_chunk import BaseLogits
from mlpmem_ds.models.logit_transform import IDENTITY, LogitTransform


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseEnd:
    """A base's final norm (None: the inputs stand behind it), and its output head."""

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None = None
    norm: nn.Module | None = None
    transform: LogitTransform = IDENTITY

    def to(self, device: torch.device, dtype: torch.dtype) -> BaseEnd:
        """The same there, in this dtype."""
        return BaseEnd(
            weight_VD=self.weight_VD.to(device, dtype),
            bias_V=None if self.bias_V is None else self.bias_V.to(device, dtype),
            norm=None if self.norm is None else self.norm.to(device, dtype),
            transform=self.transform,
        )

    @torch.no_grad()
    def logits(self, inputs_NI: torch.Tensor) -> BaseLogits:
        """The base's logits at these inputs; of inputs of several points the last D numbers are read."""
        hidden_ND = inputs_NI[:, -self.weight_VD.shape[1] :]
        return BaseLogits(
            hidden_NB=hidden_ND if self.norm is None else self.norm(hidden_ND),
            weight_VB=self.weight_VD,
            bias_V=self.bias_V,
            transform=None if self.transform.is_identity else self.transform,
        )
