"""The flags that `train`, `train_base` and `train_baseline` share, with the checks that need no file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlpmem_ds.core.config import Flags, field_of, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.flag_values import whole_number
from mlpmem_ds.core.output_files import owner_of
from mlpmem_ds.stages import shared_flags
from mlpmem_ds.stages.training.defaults import LEARNING_RATE_HELP
from mlpmem_ds.stages.training.schedule import DECAY_SHARE, SCHEDULE_HELP, Schedule


def _steps_or_word(word: str) -> int | Literal["auto", "epoch"]:
    return "auto" if word == "auto" else "epoch" if word == "epoch" else whole_number(word)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Flags):
    """How a training runs, of a memory or of a base."""

    ds_config: Path = option("DeepSpeed configuration, one of ds_configs/", identity="resolved")
    corpus: Path = option(
        "corpus directory: its train split is learned, its tuning split is used to validate", by_url=True
    )
    output: Path = option("directory to write")
    epochs: float = option("passes over the train split", 5.0, above=0, at_most=1e6)
    learning_rate: float | None = option(
        f"peak of the learning rate (default: {LEARNING_RATE_HELP})", None, above=0
    )
    warmup_fraction: float = option("share of the steps that warm up", 0.05, at_least=0, at_most=1)
    schedule: Schedule = option(SCHEDULE_HELP, "cosine")
    decay_fraction: float | None = option(
        f"share of the steps after the warm-up in which wsd decays (default: {DECAY_SHARE})",
        None,
        at_least=0,
        at_most=1,
    )
    weight_decay: float = option("of matrices, not of biases and norms", 0.1, at_least=0)
    gradient_clipping: float | None = option(
        "norm at which gradients are clipped; none = never", 1.0, above=0
    )
    seed: int = option("seed of the initial weights and of the order", 0, at_least=0)
    validate_every: int | Literal["auto", "epoch"] | None = option(
        "steps between validations on the tuning split; epoch = after each epoch; auto = five a run of"
        " `train`, each epoch of `train_base`, four an epoch of `train_baseline`; none = never",
        "auto",
        at_least=1,
        parse=_steps_or_word,
        metavar="STEPS",
    )
    early_stopping_patience: int | None = option(
        "end the training after this many validations without a better perplexity; none = never",
        None,
        at_least=1,
    )
    select: Literal["last", "best"] | None = option(
        "weights that are written: the last, or those of the best validation (default: best with early"
        " stopping, else last)",
        None,
    )
    time_budget_seconds: float | None = option(
        "end the training after this many seconds, over all starts without their loading, and write its"
        " result as after the last step; none = no limit",
        None,
        above=0,
    )
    stop_after_seconds: float | None = option(
        "save and exit this many seconds after this start's first step; the same command continues; none ="
        " no limit",
        None,
        above=0,
        identity="none",
    )
    save_every_steps: int = option("steps between checkpoints", 500, at_least=1, identity="none")
    keep_checkpoints: int = option("newest checkpoints kept", 2, at_least=1, identity="none")
    copy_to: Path | None = option(
        "second place for checkpoints, of this training alone: copied in the background, and resumed from if"
        " OUTPUT's are gone",
        None,
        identity="none",
    )
    resume: Literal["auto", "never"] = option(
        "continue from the newest whole checkpoint, or discard the checkpoints and their copies and start"
        " anew",
        "auto",
        identity="none",
    )
    log_every_steps: int = option("steps between log lines", 10, at_least=1, identity="none")
    max_skipped_steps: int | None = option(
        "steps in a row without finite gradients after which the training fails; none = never",
        10,
        at_least=1,
        identity="none",
    )
    rank_timeout_seconds: float = shared_flags.rank_timeout_seconds()
    wandb_project: str | None = option("Weights & Biases project to log to as well", None, identity="none")

    def check(self) -> None:
        if self.schedule != "wsd":
            self.refuse_unused("decay_fraction", of="--schedule wsd")
        if self.copy_to is not None:
            self._check_copies(self.copy_to)
        if self.validate_every is None and (self.early_stopping_patience or self.select == "best"):
            raise UserError(
                "--early-stopping-patience and --select best need validation: give them none and last, or a"
                " --validate-every other than none"
            )

    def _check_copies(self, place: Path) -> None:
        """Copies are of use where --output is lost, and are no part of another directory."""
        output, resolved = self.output.resolve(), place.resolve()
        owner = output if output in (resolved, *resolved.parents) else owner_of(place)
        if owner is not None:
            raise UserError(
                f"--copy-to {place} is {'' if owner == resolved else 'in '}{owner}, which a command of this"
                " project writes: name a directory of its own, on another disk"
            )

    @property
    def selects_best(self) -> bool:
        """Whether the best validation's weights are the result."""
        return self.select == "best" or (self.select is None and self.early_stopping_patience is not None)

    @property
    def may_end_early(self) -> bool:
        """Whether fewer steps than planned may be the whole training."""
        return self.early_stopping_patience is not None or self.time_budget_seconds is not None

    @property
    def decay_share(self) -> float:
        """Of the steps after the warm-up."""
        return DECAY_SHARE if self.decay_fraction is None else self.decay_fraction


def with_default(name: str, default: Any) -> Any:
    """A shared flag again, for a Config where it has another default."""
    return dataclasses.field(default=default, metadata=field_of(TrainingOptions, name).metadata)
