"""The flags of `train_base`, with the checks that need no file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.shipped import ds_configs
from mlpmem_ds.stages.training.defaults import TRAINED_ON_LEARNING_RATE
from mlpmem_ds.stages.training.options import TrainingOptions, with_default


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """Train a GPT-2-like language model on a corpus, or train an existing model on; any number of ranks."""

    example: ClassVar[str] = (
        "torchrun --nproc-per-node 2 tools/train_base.py --corpus run/corpus --output run/base --epochs 8"
    )
    memory_flags: ClassVar[tuple[str, ...]] = ("--micro-batch-tokens",)

    ds_config: Path = with_default("ds_config", ds_configs() / "zero2.json")
    epochs: float = with_default("epochs", 8.0)
    early_stopping_patience: int | None = with_default("early_stopping_patience", 2)
    init_from: str | None = option(
        "train this model on, a directory or Hub name, instead of a new one (then the learning rate's default"
        f" is {TRAINED_ON_LEARNING_RATE:g})",
        None,
        identity="none",
    )
    num_layers: int = option("layers of a new model", 4, at_least=1)
    hidden_size: int = option("width of a new model", 256, at_least=1)
    num_heads: int = option("attention heads of a new model", 4, at_least=1)
    dropout: float = option("of a new model", 0.0, at_least=0, below=1)
    context: int | None = option(
        "tokens of a sequence (default: the corpus's block size)", None, at_least=2, identity="resolved"
    )
    batch_tokens: int = option("tokens in a step, over all ranks", 2048, at_least=1)
    micro_batch_tokens: int = option(
        "tokens that a rank takes through the model at once, at most", 16384, at_least=1, identity="none"
    )

    def check(self) -> None:
        super().check()
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"--hidden-size {self.hidden_size} is not a multiple of --num-heads {self.num_heads}"
            )
