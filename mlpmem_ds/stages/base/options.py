"""The flags that `train_base` and `train_baseline` share: how a language model reads a corpus to learn it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.core.config import option
from mlpmem_ds.core.shipped import ds_configs
from mlpmem_ds.stages.training.options import TrainingOptions, with_default


@dataclass(frozen=True, kw_only=True)
class DecoderOptions(TrainingOptions):
    """How a language model is trained on a corpus."""

    memory_flags: ClassVar[tuple[str, ...]] = ("--micro-batch-tokens",)

    ds_config: Path = with_default("ds_config", ds_configs() / "zero2.json")
    steps: int | None = option("optimizer steps, in place of --epochs", None, at_least=1)
    context: int | None = option(
        "tokens of a sequence (default: the corpus's block size)", None, at_least=2, identity="resolved"
    )
    batch_tokens: int = option("tokens in a step, over all ranks", 2048, at_least=1)
    micro_batch_tokens: int = option(
        "tokens that a rank takes through the model at once, at most", 16384, at_least=1, identity="none"
    )
