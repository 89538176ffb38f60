"""Part of `train`: the objectives that imitate the retriever, everywhere (`imitation`) or where it is better
than the base at the label (`helpful`).

loss = alpha KL(kNN || memory) + (1 - alpha) CE; where the retriever is not to be imitated, CE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mlpmem_ds.formats.training_rows import MicroBatch
from mlpmem_ds.maths.sparse_loss import TargetBatch
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.objective import HELPFUL_SUM_NAMES, SUM_NAMES, MemoryWithLoss
from mlpmem_ds.stages.training.config import Config


@dataclass(frozen=True, kw_only=True)
class Imitation:
    """The loss above; with a `mixture_lambda` its CE is that of the mixture with the base."""

    memory: MemoryConfig
    alpha: float
    mixture_lambda: float | None
    only_helpful: bool = False

    rows = "positions"
    needs_base_end = False

    @classmethod
    def of(cls, config: Config, memory: MemoryConfig) -> Imitation:
        through_mixture = config.ce_through == "mixture"
        return cls(
            memory=memory,
            alpha=config.kl_weight,
            mixture_lambda=config.mixture_lambda if through_mixture else None,
            only_helpful=config.objective == "helpful",
        )

    @property
    def sums(self) -> tuple[str, ...]:
        return HELPFUL_SUM_NAMES if self.only_helpful else SUM_NAMES

    @property
    def flops_per_row(self) -> float:
        return self.memory.training_flops()

    @property
    def needs_targets(self) -> bool:
        return self.alpha > 0

    @property
    def needs_base_log_probabilities(self) -> bool:
        return self.mixture_lambda is not None or self.only_helpful

    def make_module(self) -> nn.Module:
        return MemoryWithLoss(
            self.memory,
            alpha=self.alpha,
            mixture_lambda=self.mixture_lambda,
            only_helpful=self.only_helpful,
        )

    def arguments(
        self, micro_batch: MicroBatch, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, TargetBatch]:
        # Copied in 16 bits, then converted: the other way round the host would do it.
        inputs_NI = micro_batch.inputs_NI.to(device, non_blocking=True).to(dtype)
        return inputs_NI, micro_batch.targets.to(device)
