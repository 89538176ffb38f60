"""Part of `train` and `train_base`: the default learning rate, and a warning of too small batches."""

from __future__ import annotations

import logging

from mlpmem_ds.core.world import World

_logger = logging.getLogger(__name__)
_SMALL_LEARNING_RATE, _LARGE_LEARNING_RATE = 2e-3, 3e-4
_LARGE_PARAMETERS = 100_000_000
_MIN_ROWS_ON_GPU = 1024
START_LEARNING_RATE = 1e-3
"""at most, of a memory that starts as its base: of 3e-4 and 1e-3 it was the better one (docs/when.md)"""
LEARNING_RATE_HELP = (
    f"{_SMALL_LEARNING_RATE:g}; {_LARGE_LEARNING_RATE:g} above {_LARGE_PARAMETERS / 1e6:.0f} M trained"
    " parameters"
)


def default_learning_rate(num_parameters: int) -> float:
    """The peak of the learning rate of a model of so many trained parameters, where none is given."""
    return _SMALL_LEARNING_RATE if num_parameters <= _LARGE_PARAMETERS else _LARGE_LEARNING_RATE


def warn_of_few_rows(rows_per_step: int, world: World, *, flag: str, on_gpu: bool) -> None:
    """Say so where a step gives each GPU less than fills it; `flag` names what sets the rows of a step, over
    all ranks."""
    rows = rows_per_step // world.size
    if on_gpu and rows < _MIN_ROWS_ON_GPU:
        _logger.warning(
            "each GPU takes %d rows a step, too few to fill it: give %s %d or more",
            rows,
            flag,
            _MIN_ROWS_ON_GPU * world.size,
        )
