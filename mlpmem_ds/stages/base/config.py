"""The flags of `train_base`, with the checks that need no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.stages.base.options import DecoderOptions
from mlpmem_ds.stages.training.options import with_default


@dataclass(frozen=True, kw_only=True)
class Config(DecoderOptions):
    """Train a small GPT-2-like language model on a corpus, from scratch; any number of ranks."""

    example: ClassVar[str] = (
        "torchrun --nproc-per-node 2 tools/train_base.py --corpus run/corpus --output run/base --epochs 8"
    )

    epochs: float = with_default("epochs", 8.0)
    early_stopping_patience: int | None = with_default("early_stopping_patience", 2)
    num_layers: int = option("layers of the model", 4, at_least=1)
    hidden_size: int = option("its width", 256, at_least=1)
    num_heads: int = option("its attention heads", 4, at_least=1)
    dropout: float = option("its dropout", 0.0, at_least=0, below=1)

    def check(self) -> None:
        super().check()
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"--hidden-size {self.hidden_size} is not a multiple of --num-heads {self.num_heads}"
            )
