"""The flags of `train_base`, with the checks that need no file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlpmem_ds.commands import folder
from mlpmem_ds.core.config import option, require_at_least
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.stages.training.defaults import LEARNING_RATE_HELP
from mlpmem_ds.stages.training.loop import SCHEDULE_HELP, Schedule

_DEFAULT_DS_CONFIG = folder("ds_configs") / "zero2.json"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What base is trained, and how."""

    corpus: Path = option(
        "corpus directory; its `train` split is learnt, its `tuning` split decides when to stop"
    )
    output: Path = option("model directory to write (Hugging Face format)")
    ds_config: Path = option("DeepSpeed configuration of ZeRO stage 1 or 2", _DEFAULT_DS_CONFIG)
    init_from: str | None = option(
        "train this model on, a directory or Hub name, instead of a new one", None, identity="none"
    )
    num_layers: int = option("layers of a new model", 4)
    hidden_size: int = option("width of a new model", 256)
    num_heads: int = option("attention heads of a new model", 4)
    dropout: float = option("of a new model", 0.0)
    context: int | None = option("tokens of a sequence (default: the corpus's block size)", None)
    epochs: int = option("most passes over the train split", 8)
    batch_tokens: int = option("tokens in a step, over all ranks", 2048)
    micro_batch_tokens: int = option(
        "most tokens that a rank takes through the model at once", 16384, identity="none"
    )
    learning_rate: float | None = option(
        f"peak of the learning rate (default: {LEARNING_RATE_HELP}, and with --init-from)", None
    )
    warmup_fraction: float = option("share of the steps that warm up", 0.05)
    schedule: Schedule = option(SCHEDULE_HELP, "cosine")
    weight_decay: float = option("of matrices, not of biases and norms", 0.1)
    gradient_clipping: float = option("norm at which gradients are clipped; 0 = never", 1.0)
    early_stopping_patience: int = option(
        "stop after so many epochs without a better tuning perplexity; 0 = never", 2
    )
    select: Literal["best", "last"] = option("which epoch's weights are written", "best")
    time_budget: float = option(
        "seconds of training, over all starts, after which it is finished; 0 = no limit", 0.0
    )
    seed: int = option("seed of the initial weights and of the order", 0)
    save_every_steps: int = option(
        "steps between checkpoints; there is one after each epoch too", 500, identity="none"
    )
    keep_checkpoints: int = option("newest checkpoints kept", 1, identity="none")
    log_every_steps: int = option("steps between log lines", 10, identity="none")

    def __post_init__(self) -> None:
        require_at_least(
            self,
            1,
            (
                "num_layers",
                "hidden_size",
                "num_heads",
                "epochs",
                "batch_tokens",
                "micro_batch_tokens",
                "save_every_steps",
                "keep_checkpoints",
                "log_every_steps",
            ),
        )
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"--hidden-size {self.hidden_size} is not a multiple of --num-heads {self.num_heads}"
            )
        if not 0 <= self.dropout < 1 or not 0 <= self.warmup_fraction <= 1:
            raise UserError("--dropout must lie in [0, 1) and --warmup-fraction in [0, 1]")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UserError(f"--learning-rate must be more than 0, not {self.learning_rate}")
        if min(self.weight_decay, self.gradient_clipping, self.time_budget) < 0:
            raise UserError("--weight-decay, --gradient-clipping and --time-budget must not be negative")
        if self.context is not None and self.context < 2:
            raise UserError(f"--context must be at least 2 tokens, not {self.context}")
