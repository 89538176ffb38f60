"""The flags of `train`, with the checks that need no file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlpmem_ds.core.config import option, require_at_least
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.models.memory import PRESETS
from mlpmem_ds.stages.training.defaults import LEARNING_RATE_HELP
from mlpmem_ds.stages.training.loop import DECAY_SHARE, SCHEDULE_HELP, Schedule
from mlpmem_ds.stages.training.validation import DEFAULT_POSITIONS, VALIDATIONS_A_RUN

_PRESETS_VOCABULARY = 32_000
_PRESETS_HELP = ", ".join(
    f"{name} {make(_PRESETS_VOCABULARY).num_parameters() / 1e6:,.0f} M" for name, make in PRESETS.items()
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained, on what, and how."""

    ds_config: Path = option("DeepSpeed configuration, one of ds_configs/")
    corpus: Path = option("corpus directory")
    targets: Path | None = option("target directory; may be left out with --alpha 0", None)
    keys: Path | None = option("key directory (default: `keys` beside --targets)", None)
    output: Path = option("training directory to write")
    model: str | None = option(
        "base, a directory or Hub name: for --head base, for keys that store no inputs, and for validation on"
        " the corpus's tuning split",
        None,
        identity="none",
    )
    base_sharding: Literal["none", "zero3"] = option(
        "the base beside the training (keys without inputs, validation): whole on each rank, or cut over the"
        " ranks by ZeRO-3, for one that is larger than a GPU; slower, the same numbers",
        "none",
        identity="none",
    )
    preset: str | None = option(
        "a named size of memory, instead of the four flags below; parameters at a vocabulary of"
        f" {_PRESETS_VOCABULARY:,}: " + _PRESETS_HELP,
        None,
        choices=tuple(PRESETS),
    )
    num_blocks: int | None = option("residual blocks (default: 4)", None)
    hidden_size: int | None = option("width (default: the inputs')", None)
    intermediate_size: int | None = option("width inside a block (default: 4 x the width)", None)
    family: Literal["gelu", "swiglu"] | None = option("kind of block (default: gelu)", None)
    head: Literal["random", "base"] = option("start of the output head: random, or the base's own", "random")
    init_from: Path | None = option(
        "memory whose weights and shape this training starts from: an output of launch/train.py, its"
        " weights/, or an export or its Hub name",
        None,
    )
    alpha: float = option("weight of KL(kNN || memory); 1 - alpha is that of the cross entropy", 0.5)
    ce_through: Literal["plain", "mixture"] = option(
        "cross entropy of the memory alone, or of its interpolation with the base", "plain"
    )
    mixture_lambda: float = option("weight of the memory in that interpolation", 0.25)
    epochs: float = option("passes over all positions", 5.0)
    batch_positions: int = option("positions in a step, over all ranks", 2048)
    micro_batch_positions: int = option(
        "most positions that a rank takes through the model at once", 8192, identity="none"
    )
    learning_rate: float | None = option(f"peak of the learning rate (default: {LEARNING_RATE_HELP})", None)
    warmup_fraction: float = option("share of the steps that warm up", 0.05)
    schedule: Schedule = option(SCHEDULE_HELP, "cosine")
    decay_fraction: float | None = option(
        f"share of the steps after the warm-up in which wsd decays (default: {DECAY_SHARE})", None
    )
    weight_decay: float = option("of matrices, not of biases and norms", 0.1)
    gradient_clipping: float = option("norm at which gradients are clipped; 0 = never", 1.0)
    seed: int = option("seed of the initial weights and of the order", 0)
    shuffle_window_blocks: int = option(
        "blocks of positions that are shuffled together; each rank holds two such windows", 1024
    )
    order: Literal["positions", "blocks"] | None = option(
        "shuffle positions within windows, or whole blocks (default: positions; blocks where the keys store"
        " no inputs)",
        None,
    )
    validate_every: int | None = option(
        f"steps between validations; 0 = never (default: {VALIDATIONS_A_RUN} times a run if there is --model"
        " and a tuning split)",
        None,
    )
    validation_positions: int | None = option(
        f"most positions of the tuning split that a validation scores (default: {DEFAULT_POSITIONS:,})", None
    )
    early_stopping_patience: int | None = option(
        "stop after so many validations without a better perplexity (default: never)", None
    )
    select: Literal["last", "best"] | None = option(
        "weights that are written: the last, or those of the best validation (default: last; best with early"
        " stopping)",
        None,
    )
    recompute_activations: bool = option(
        "compute activations again in the backward instead of keeping them: less memory, a little more time",
        False,
        identity="none",
    )
    compile: bool = option(
        "let torch.compile make one kernel of what stands between a block's matrices (swiglu gains); needs a"
        " C++ compiler, on a GPU Triton",
        False,
        identity="none",
    )
    save_every_steps: int = option("steps between checkpoints", 500, identity="none")
    keep_checkpoints: int = option("newest checkpoints kept", 2, identity="none")
    copy_to: Path | None = option(
        "second place for checkpoints, copied in the background and resumed from if OUTPUT's are gone", None
    )
    resume: Literal["auto", "never"] = option(
        "continue from the newest whole checkpoint, or discard the checkpoints and start anew",
        "auto",
        identity="none",
    )
    log_every_steps: int = option("steps between log lines", 10, identity="none")
    max_seconds: float = option(
        "save and stop after so many seconds of steps; the same command continues; 0 = no limit",
        0.0,
        identity="none",
    )
    max_skipped_steps: int = option(
        "steps in a row without finite gradients after which the training stops; 0 = never",
        10,
        identity="none",
    )
    wandb_project: str | None = option("Weights & Biases project to log to as well", None, identity="none")

    def __post_init__(self) -> None:
        require_at_least(
            self,
            1,
            (
                "batch_positions",
                "micro_batch_positions",
                "shuffle_window_blocks",
                "save_every_steps",
                "keep_checkpoints",
                "log_every_steps",
            ),
        )
        for name in ("alpha", "warmup_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must lie in [0, 1], not {getattr(self, name)}")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} must be more than 0, not {value}")
        if self.gradient_clipping < 0 or self.weight_decay < 0:
            raise UserError("--gradient-clipping and --weight-decay must not be negative")
        if not 0 < self.mixture_lambda <= 1:
            raise UserError(f"--mixture-lambda must lie in (0, 1], not {self.mixture_lambda}")
        if self.targets is None and (self.alpha > 0 or self.keys is None):
            raise UserError("--targets is needed (without it: --alpha 0 and --keys)")
        if self.head == "base" and self.model is None:
            raise UserError("--head base needs --model, the base whose output head is copied")
        if self.head == "base" and self.init_from is not None:
            raise UserError("--init-from brings its own output head: leave out --head base")
        shape = [
            name
            for name in ("num_blocks", "hidden_size", "intermediate_size", "family")
            if getattr(self, name) is not None
        ]
        self._check_validation()
        if self.decay_fraction is not None and (self.schedule != "wsd" or not 0 <= self.decay_fraction <= 1):
            raise UserError(
                f"--decay-fraction {self.decay_fraction} is a share in [0, 1] of the steps of --schedule wsd,"
                f" not of {self.schedule}: leave it out or change the schedule"
            )
        if not 0 <= self.max_seconds < math.inf:
            raise UserError(f"--max-seconds must be a number of at least 0, not {self.max_seconds}")
        if self.max_skipped_steps < 0:
            raise UserError(f"--max-skipped-steps must be 0 or more, not {self.max_skipped_steps}")
        if self.preset and shape:
            raise UserError(
                f"--preset {self.preset} fixes the shape: leave out --{shape[0].replace('_', '-')}"
            )

    def _check_validation(self) -> None:
        for name, least in (
            ("validate_every", 0),
            ("validation_positions", 1),
            ("early_stopping_patience", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if self.model is None and self.validate_every:
            raise UserError("--validate-every needs --model, the base that the keys were extracted with")
        if (self.early_stopping_patience or self.select == "best") and (
            self.model is None or self.validate_every == 0
        ):
            raise UserError(
                "--early-stopping-patience and --select best need validation: give --model, and a"
                " --validate-every other than 0"
            )

    @property
    def selects_best(self) -> bool:
        """Whether the best validation's weights are the result."""
        return self.select == "best" or (self.select is None and bool(self.early_stopping_patience))
