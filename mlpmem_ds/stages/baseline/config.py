"""The flags of `train_baseline`, with the checks that need no file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.stages.base.options import DecoderOptions
from mlpmem_ds.stages.training.options import with_default

Kind = Literal["continued", "lora", "bigger"]
CONTINUED_LEARNING_RATE = 1e-4
LORA_LEARNING_RATE = 1e-3
"""ten times that of all weights (Schulman et al., "LoRA Without Regret")"""


@dataclass(frozen=True, kw_only=True)
class Config(DecoderOptions):
    """Train what a memory is compared with: the base trained on, low-rank matrices, or a bigger model.

    `continued` trains all weights of --model on; `lora` low-rank matrices next to its linear layers, merged
    into it at the end; `bigger` a model of its family from scratch, of the size of base and memory together.
    """

    example: ClassVar[str] = (
        "python tools/train_baseline.py --kind lora --model run/base --corpus run/corpus"
        " --match-memory run/memory --output run/lora"
    )

    kind: Kind = option("continued, lora or bigger, see above")
    model: str = option("the base: a directory or Hub name", identity="none", by_url=True)
    match_memory: Path | None = option(
        "lora, bigger: spend as many parameters as this memory (output of launch/train.py, or export)",
        None,
        identity="none",
        by_url=True,
    )
    match_parameters: int | None = option(
        "lora, bigger: spend this many parameters", None, at_least=1, identity="resolved"
    )
    rank: int | None = option(
        "lora: rank of its matrices, in place of a number of parameters",
        None,
        at_least=1,
        identity="resolved",
    )
    lora_alpha: float = option("lora: its matrices' product counts alpha / rank times", 32.0, above=0)
    epochs: float = with_default("epochs", 8.0)
    learning_rate: float | None = option(
        f"peak of the learning rate (default: continued {CONTINUED_LEARNING_RATE:g}, lora"
        f" {LORA_LEARNING_RATE:g}, bigger as in train_base)",
        None,
        above=0,
    )
    early_stopping_patience: int | None = with_default("early_stopping_patience", 4)

    def check(self) -> None:
        super().check()
        given = self.given("match_memory", "match_parameters", "rank")
        if self.kind == "continued" and given:
            raise UserError(f"--kind continued trains the weights that there are: leave out {given[0]}")
        if self.kind != "lora":
            self.refuse_unused("lora_alpha", of="--kind lora")
        if self.kind == "bigger" and self.rank is not None:
            raise UserError("--rank is of --kind lora: give --match-memory or --match-parameters")
        if self.kind != "continued" and len(given) != 1:
            raise UserError(
                f"--kind {self.kind} needs its size: give one of --match-memory, --match-parameters"
                f"{' and --rank' if self.kind == 'lora' else ''}, not {' and '.join(given) or 'none'}"
            )
