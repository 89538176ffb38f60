"""The flags by which `generate` and `run_lm_eval` name a joint model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.stages import shared_flags


@dataclass(frozen=True, kw_only=True)
class JointOptions(Flags):
    """An exported model, or a base and trained memories that are joined here."""

    model: str = option("exported model, or with --memory the base: a directory or Hub name", by_url=True)
    memory: tuple[Path, ...] = option(
        "memories to join with the base, instead of an export: output directories of launch/train.py;"
        " several make a bank",
        (),
        by_url=True,
    )
    gate: Path | None = option(
        "with --memory: output directory of launch/fit_gate.py, which weighs these memories",
        None,
        by_url=True,
    )
    tokenizer: str | None = option(
        "with --memory: directory or Hub name (default: the base's, else the corpus's)", None, by_url=True
    )
    base_only_threshold: float | None = option(
        "leave a memory out where its weight is below this (default: as an export says for its own gate;"
        " never for a λ that a flag names)",
        None,
        at_least=0,
        at_most=1,
    )

    def check(self) -> None:
        shared_flags.refuse_repeated(self.memory, flag="--memory")
        if not self.memory:  # an export has its own
            self.refuse_unused("gate", "tokenizer", of="--memory, with the base as --model")
