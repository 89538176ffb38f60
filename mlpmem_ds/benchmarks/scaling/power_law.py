"""Part of `fit_scaling`: power laws through a few points, and intervals of their exponents.

The loss, nats a token (log perplexity), over x, parameters or floating-point operations:

    loss = a · x^-b              fitted by least squares of log loss on log x
    loss = a · x^-b + c          c, the loss that no size removes, from a grid below the smallest loss: for
                                 each c the line through log(loss - c), and of all c the one whose curve is
                                 nearest to the losses, by squares of relative differences

The second needs four sizes or more: with three, three numbers fit anything.

P points, R draws of their losses, F floors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
MIN_SIZES, MIN_SIZES_WITH_FLOOR = 3, 4
_FLOOR_SHARES_F = np.linspace(0, 1, 400, endpoint=False)  # of the smallest loss


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """loss = scale · x^-exponent + floor."""

    scale: float
    exponent: float
    floor: float

    def __call__(self, x: Array) -> Array:
        values: Array = self.scale * np.asarray(x, dtype=np.float64) ** -self.exponent + self.floor
        return values


def fit_power_law(x_P: Array, loss_P: Array, *, has_floor: bool = False) -> PowerLaw:
    """The power law through these points.

    Raises:
        ValueError: too few different sizes, or a number that is not above 0.
    """
    scales_R, exponents_R, floors_R = _fit_draws(x_P, np.asarray(loss_P)[None], has_floor=has_floor)
    return PowerLaw(scale=float(scales_R[0]), exponent=float(exponents_R[0]), floor=float(floors_R[0]))


def exponent_interval(x_P: Array, losses_RP: Array, *, has_floor: bool = False) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of the exponents that R draws of the points' losses give. Raises
    ValueError as `fit_power_law`."""
    low, high = np.quantile(_fit_draws(x_P, losses_RP, has_floor=has_floor)[1], [0.025, 0.975])
    return float(low), float(high)


def _fit_draws(x_P: Array, losses_RP: Array, *, has_floor: bool) -> tuple[Array, Array, Array]:
    """(scale, exponent, floor) of each draw, each [R]."""
    x_P, losses_RP = np.asarray(x_P, dtype=np.float64), np.asarray(losses_RP, dtype=np.float64)
    num_sizes, min_sizes = len(np.unique(x_P)), MIN_SIZES_WITH_FLOOR if has_floor else MIN_SIZES
    if num_sizes < min_sizes:
        raise ValueError(f"{num_sizes} sizes; a power law needs {min_sizes} or more")
    if not (x_P > 0).all() or not (losses_RP > 0).all():
        raise ValueError("sizes and losses of a power law must be above 0")
    shares_F = _FLOOR_SHARES_F if has_floor else np.zeros(1)
    floors_RF = losses_RP.min(axis=1, keepdims=True) * shares_F
    log_x_P = np.log(x_P)
    centred_P = log_x_P - log_x_P.mean()
    log_loss_RFP = np.log(losses_RP[:, None, :] - floors_RF[:, :, None])
    slopes_RF = log_loss_RFP @ centred_P / (centred_P @ centred_P)  # least squares of a line
    means_RF = log_loss_RFP.mean(axis=2) - slopes_RF * log_x_P.mean()
    curves_RFP = np.exp(means_RF[:, :, None] + slopes_RF[:, :, None] * log_x_P) + floors_RF[:, :, None]
    errors_RF = np.square(curves_RFP / losses_RP[:, None, :] - 1).sum(axis=2)
    rows_R, best_R = np.arange(len(losses_RP)), errors_RF.argmin(axis=1)
    return np.exp(means_RF[rows_R, best_R]), -slopes_RF[rows_R, best_R], floors_RF[rows_R, best_R]
