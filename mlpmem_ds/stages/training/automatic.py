"""Part of `train`: what `--objective auto` chooses, from what is known before the training, and why.

The rule is one table, `RULES`: the first whose facts are given decides. Flags that are given next to
`--objective auto` keep their values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from mlpmem_ds.core.config import default_of, flag_name
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.training.config import Config
from mlpmem_ds.stages.training.inputs import TrainingInputs
from mlpmem_ds.stages.training.recipes import RECIPES, recipe_changes

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known before the first step."""

    num_positions: int
    """of the train split"""
    has_targets: bool
    starts_as_base: bool
    """whether p_mem = p_base before the first step"""
    has_log_probabilities: bool
    """whether the keys hold the base's, through which the mixture is trained"""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is to be minimized, how long for at the least, and the reason in a sentence."""

    objective: Literal["imitation", "helpful", "joined"]
    alpha: float
    ce_through: Literal["plain", "mixture"]
    min_epochs: float
    """fewer passes are worth a warning"""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A choice, and the facts that it is for."""

    holds: Callable[[Facts], bool]
    choice: Choice


_FEW_POSITIONS = 500_000
_EPOCHS = 5.0

_with_targets = partial(Choice, objective="imitation", alpha=0.5, min_epochs=_EPOCHS)

RULES: Sequence[Rule] = (  # the figures: docs/LAB.md
    Rule(
        holds=lambda facts: not facts.has_targets,
        choice=Choice(
            objective="imitation",
            alpha=0.0,
            ce_through="plain",
            min_epochs=1.0,
            reason="without targets there is no retriever to imitate: cross entropy alone",
        ),
    ),
    Rule(
        holds=lambda facts: facts.starts_as_base,
        choice=_with_targets(
            ce_through="plain",
            reason=(
                "a memory that starts as its base gained most from imitation and cross entropy together, over"
                " five epochs or more; over two on a real base cross entropy alone gained as much, for which"
                " leave out --targets"
            ),
        ),
    ),
    Rule(
        holds=lambda facts: facts.num_positions < _FEW_POSITIONS and facts.has_log_probabilities,
        choice=_with_targets(
            ce_through="mixture",
            reason=(
                f"below {_FEW_POSITIONS:,} positions fresh blocks gained most from imitation with cross"
                " entropy through the mixture"
            ),
        ),
    ),
    Rule(
        holds=lambda facts: facts.num_positions < _FEW_POSITIONS,
        choice=_with_targets(
            ce_through="plain",
            reason=(
                f"below {_FEW_POSITIONS:,} positions cross entropy through the mixture gained more, but the"
                " keys hold no log-probabilities of the base, which it reads: imitation with plain cross"
                " entropy"
            ),
        ),
    ),
    Rule(
        holds=lambda facts: True,
        choice=_with_targets(
            ce_through="plain",
            reason=(
                f"from {_FEW_POSITIONS:,} positions on fresh blocks gained most from imitation with plain"
                " cross entropy"
            ),
        ),
    ),
)


def choose(facts: Facts) -> Choice:
    """The choice of the first rule that holds."""
    return next(rule.choice for rule in RULES if rule.holds(facts))


def settle(config: Config, inputs: TrainingInputs, world: World) -> tuple[Config, TrainingInputs]:
    """The flags with all that was left to choose, and the inputs with the reason; both are logged."""
    if config.recipe is not None and world.is_first:
        _logger.info("--recipe %s, %s: %s", config.recipe, RECIPES[config.recipe].source, _words(config))
    if config.objective != "auto":
        return config, inputs
    choice = choose(
        Facts(
            num_positions=inputs.keys.num_positions,
            has_targets=inputs.targets is not None,
            starts_as_base=config.start == "base",
            has_log_probabilities=inputs.keys.has_log_probabilities,
        )
    )
    ce_through = config.ce_through or choice.ce_through
    unused = config.given("mixture_lambda") if ce_through == "plain" else []
    config = replace(
        config,
        objective=choice.objective,
        alpha=choice.alpha if config.alpha is None else config.alpha,
        ce_through=ce_through,
        mixture_lambda=default_of(Config, "mixture_lambda") if unused else config.mixture_lambda,
    )
    if world.is_first:
        _logger.info(
            "--objective auto chose --objective %s --alpha %g --ce-through %s: %s",
            config.objective,
            config.kl_weight,
            config.ce_through,
            choice.reason,
        )
        if unused:
            _logger.warning(
                "%s is not used: it is of --ce-through mixture, which can be given next to --objective auto",
                unused[0],
            )
        if config.epochs < choice.min_epochs:
            _logger.warning(
                "--epochs %g: with fewer than %g passes the objectives rank otherwise, and all gain less",
                config.epochs,
                choice.min_epochs,
            )
    return config, replace(inputs, objective_reason=choice.reason)


def _words(config: Config) -> str:
    """The recipe's flags as they are, and which of them were given otherwise."""
    assert config.recipe is not None
    changes = recipe_changes(config)
    return ", ".join(
        f"{flag_name(name)} {getattr(config, name)}{' (changed)' if name in changes else ''}"
        for name in RECIPES[config.recipe].flags
    )
