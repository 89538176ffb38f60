"""Part of `train`: whether the base was itself trained on the text.

A memory that starts as such a base has little left to learn there: by cross entropy it gained nothing where
fresh blocks that imitate the retriever gained 10 % of perplexity (docs/LAB.md, "Longer trainings").
"""

from __future__ import annotations

import logging
import math

import numpy as np

from mlpmem_ds.formats.keys import Keys
from mlpmem_ds.maths.scores import perplexity

_logger = logging.getLogger(__name__)
_KNOWN_SHARE = 0.75  # of the perplexity on other text: bases trained on the text had .3 to .5, others about 1
_NUM_UNITS, _ROWS_OF_UNIT = 16, 4096


def train_perplexity(keys: Keys) -> float:
    """The base's on a sample of the train split, the first rows of units all over it: exp of nats a token."""
    blocks = keys.blocks
    chosen = blocks[:: math.ceil(len(blocks) / _NUM_UNITS)]
    rows = [keys.unit("log_probabilities", block.start)[:_ROWS_OF_UNIT] for block in chosen]
    return perplexity(np.concatenate(rows))


def warn_of_known_text(keys: Keys, tuning_perplexity: float) -> None:
    """Say so where the base is far better on the train split than on the tuning split."""
    trained = train_perplexity(keys)
    if trained < _KNOWN_SHARE * tuning_perplexity:
        _logger.warning(
            "--start base: the base's perplexity is %.4g on the train split and %.4g on the tuning split: it"
            " was probably trained on this text. A memory that starts as such a base gains little; fresh"
            " blocks that imitate the retriever gain more (--start random, with --targets)",
            trained,
            tuning_perplexity,
        )
