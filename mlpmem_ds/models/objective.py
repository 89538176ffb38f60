"""The memory as training sees it: a `Memory` with a head that owns its loss, and with `TRAINING_MLPS`.

Part of `train`, not exported: its weights load into a plain `Memory` by the same names. The loss is computed
inside the forward of the module that owns the head's weight, because under ZeRO-3 the weight exists as a
whole only there: a function outside that reads `head.weight` would meet an empty tensor.

Shapes: N rows (positions), H hidden size, I input size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TypeAlias

import torch
from torch import nn

from mlpmem_ds.maths.based_chunk import BaseLogits, BasePart
from mlpmem_ds.maths.head_scores import label_log_probabilities
from mlpmem_ds.maths.sparse_loss import TargetBatch, sparse_loss
from mlpmem_ds.models.activations import TRAINING_MLPS
from mlpmem_ds.models.base_end import BaseEnd
from mlpmem_ds.models.logit_transform import IDENTITY, LogitTransform
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig

Lender: TypeAlias = Callable[[], AbstractContextManager[tuple[torch.Tensor, torch.Tensor | None]]]
"""opens a head's weight [V, H] and bias [V], on the device and in the dtype that the training computes in"""

# What `SparseHead` reports besides the loss, in this order: sums over the rows, detached.
SUM_NAMES = ("kl", "ce", "weight")
HELPFUL_SUM_NAMES = ("kl", "ce", "taught", "weight")  # where KL is not on all rows


class SparseHead(nn.Module):
    """The output head `[N, H] -> [V]`; its forward is the loss against sparse targets, never the logits.

    Args:
        alpha: weight of KL(target || memory); 1 - alpha is that of the cross entropy.
        mixture_lambda: None for plain cross entropy; else the cross entropy of (1 - lambda) p_base + lambda
            p_memory.
        only_helpful: KL is left out where the target is no better than the base at the label.
        joined_lambda: None for KL(target || memory); else the target is joined with the base, and this is its
            share.
        is_shared: whether the weight is the base's, which does not change: then it is no parameter here, and
            `lender` gives weight [V, H] and bias [V] (or None) where they are whole, while it is open.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        initializer_range: float,
        bias: bool = False,
        transform: LogitTransform = IDENTITY,
        alpha: float = 0.5,
        mixture_lambda: float | None = None,
        only_helpful: bool = False,
        joined_lambda: float | None = None,
        is_shared: bool = False,
    ) -> None:
        super().__init__()
        self.alpha, self.mixture_lambda, self.only_helpful = alpha, mixture_lambda, only_helpful
        self.joined_lambda = joined_lambda
        self.transform = transform
        self.lender: Lender | None = None
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if is_shared:
            return
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.normal_(self.weight, mean=0.0, std=initializer_range)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """[N, V], in the operands' dtype: for an objective that needs all of them; call it within `forward`,
        where the weight is whole."""
        with self._tensors() as (weight_VH, bias_V):
            return self.transform(nn.functional.linear(hidden_NH, weight_VH, bias_V))

    def _tensors(self) -> AbstractContextManager[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight and bias, whole while this is open."""
        if self.weight is not None:
            return nullcontext((self.weight, self.bias))
        assert self.lender is not None, "a head that is the base's has no lender"
        return self.lender()

    def forward(
        self,
        hidden_NH: torch.Tensor,
        targets: TargetBatch | None = None,
        *,
        labels_N: torch.Tensor | None = None,
        base: BaseLogits | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """The loss against `targets`, or the log-probabilities of `labels_N`; `base` with `joined_lambda`.

        Returns:
            with targets: the mean of the rows' losses (float32 scalar) and the detached sums of
            `SUM_NAMES`, or `HELPFUL_SUM_NAMES`; with labels: float32 [N].
        """
        with self._tensors() as (weight_VH, bias_V):
            if targets is not None:
                return self._loss(hidden_NH, weight_VH, bias_V, targets, base)
            assert labels_N is not None
            transform = None if self.transform.is_identity else self.transform
            return label_log_probabilities(hidden_NH, weight_VH, labels_N, bias=bias_V, transform=transform)

    def _loss(
        self,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets: TargetBatch,
        base: BaseLogits | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        part = None
        if base is not None and self.joined_lambda is not None:
            part = BasePart(logits=base, joined_lambda=self.joined_lambda)
        loss, sums = sparse_loss(
            hidden_NH,
            weight_VH,
            targets,
            alpha=self.alpha,
            mixture_lambda=self.mixture_lambda,
            only_helpful=self.only_helpful,
            base=part,
            divisor=len(hidden_NH),
            bias_V=bias_V,
            scale=self.transform.scale,
            softcap=self.transform.softcap,
        )
        names = HELPFUL_SUM_NAMES if self.only_helpful else SUM_NAMES
        return loss, torch.stack([getattr(sums, name).float() for name in names]).detach()


class MemoryWithLoss(Memory):
    """A `Memory` whose forward is the training loss; its state dict has the names of a plain `Memory`.

    With `joined_lambda` it needs a `base_end` before its first forward, on the device and in the dtype of the
    inputs; and where the head is the base's, `lend_head` must have said what gives it.
    """

    base_end: BaseEnd | None = None

    def __init__(
        self,
        config: MemoryConfig,
        *,
        alpha: float,
        mixture_lambda: float | None = None,
        only_helpful: bool = False,
        joined_lambda: float | None = None,
    ) -> None:
        head = partial(
            SparseHead,
            alpha=alpha,
            mixture_lambda=mixture_lambda,
            only_helpful=only_helpful,
            joined_lambda=joined_lambda,
            is_shared=config.shared_head is not None,
        )
        super().__init__(config, head_class=head, mlps=TRAINING_MLPS)
        self._needs_base_end = joined_lambda is not None

    def forward(  # type: ignore[override]
        self,
        inputs_NI: torch.Tensor,
        targets: TargetBatch | None = None,
        labels_N: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """The mean loss over the N rows (float32 scalar) and the detached sums of the head's names.

        With labels in place of targets `label_log_probabilities`: under ZeRO-3 a module's own call gathers
        its weights.
        """
        if targets is None:
            assert labels_N is not None
            return self.label_log_probabilities(inputs_NI, labels_N)
        base = None
        if self._needs_base_end:
            assert self.base_end is not None, "an objective joined with the base has no base_end"
            base = self.base_end.logits(inputs_NI)
        loss, sums = self.head(super().forward(inputs_NI), targets, base=base)
        return loss, sums

    def lend_head(self, lender: Lender) -> None:
        """Let this give the weight of the base's head."""
        assert isinstance(self.head, SparseHead)
        self.head.lender = lender

    def label_log_probabilities(self, inputs_NI: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        """float32 [N]: the memory's log-probability of each row's label."""
        log_probabilities_N: torch.Tensor = self.head(super().forward(inputs_NI), labels_N=labels_N)
        return log_probabilities_N
