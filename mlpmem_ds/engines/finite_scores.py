"""Scores of answers are finite numbers, or they are refused: damaged weights and an overflow in float16 make
others, among which any answer may seem the likeliest.

B rows, V vocabulary.
"""

from __future__ import annotations

import torch

from mlpmem_ds.core.errors import UserError


def check_finite(log_probabilities: torch.Tensor, *, of: str = "the model") -> None:
    """Raises UserError where one is not finite; `of` says whose they are."""
    is_finite = log_probabilities.isfinite()
    if not bool(is_finite.all()):
        raise UserError(
            f"{int((~is_finite).sum())} of {is_finite.numel()} log-probabilities of {of} are not finite: its"
            " weights are damaged, or --dtype float32 is needed"
        )


def check_distributions(log_probabilities: torch.Tensor, *, of: str = "the model") -> None:
    """Raises UserError where a row [..., V] is none: its greatest entry is not finite. A token of probability
    0 is none of this."""
    check_finite(log_probabilities.amax(dim=-1), of=of)


def refuse_overflow(_: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
    """A logits processor of transformers' `generate`, which changes nothing. Raises UserError as
    `check_distributions`."""
    check_distributions(scores_BV)
    return scores_BV
