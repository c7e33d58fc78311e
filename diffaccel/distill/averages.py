r"""Coefficients of known averages of K checkpoints, which need no search or one number.

A moving average of rate beta an iteration, over checkpoints D iterations apart, has

.. math::
    \alpha_k \propto \gamma^{K - k}, \quad \gamma = \beta^D, \quad k = 1 .. K,

up to the iterations that were not saved. All results are float64 of shape (K) and sum to 1.

References:
    | Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better (2024)
    | https://arxiv.org/abs/2404.02241

    | Parameter-Efficient Checkpoint Merging via Metrics-Weighted Averaging (2025), arXiv 2504.18580
    | SWAD: Domain Generalization by Seeking Flat Minima (2021), arXiv 2102.08604
"""

from collections.abc import Sequence

import numpy as np

from ..errors import OptionError

__all__ = ["ema", "ema_rates", "mwa", "one_hot", "swad", "swad_window", "uniform"]


def one_hot(count: int, place: int = -1) -> np.ndarray:
    """Returns the coefficients of one checkpoint alone, the last by default."""
    found = np.zeros(count)
    found[place] = 1
    return found


def uniform(count: int) -> np.ndarray:
    """Returns the coefficients of the mean."""
    return np.full(count, 1 / count)


def ema(count: int, gamma: float) -> np.ndarray:
    """Returns the coefficients of a post-hoc moving average; 0 is the last checkpoint, 1 is the mean.

    Arguments:
        count: The number of checkpoints, which are equally far apart.
        gamma: The factor from a checkpoint to the one before, in [0, 1].

    Raises:
        OptionError: If it is out of range.
    """
    if not 0 <= gamma <= 1:
        raise OptionError(f"gamma is {gamma}; expected 0 to 1")
    weights = gamma ** np.arange(count - 1, -1, -1.0)
    return weights / weights.sum()


def ema_rates(count: int, number: int) -> list[float]:
    """Returns rates whose half-lives go in equal ratios from half a checkpoint to twice all of them."""
    return (0.5 ** (1 / np.geomspace(0.5, 2 * count, number))).tolist()


def mwa(metrics: Sequence[float], penalty: float) -> np.ndarray:
    """Returns metrics-weighted coefficients: softmax(-p (m - min m) / std m).

    Arguments:
        metrics: The metric of each checkpoint, less being better; or its loss, or less its step.
        penalty: p, from 0 (the mean) on.

    Raises:
        OptionError: If a metric is not finite, or the penalty below 0.
    """
    found = np.asarray(metrics, dtype=np.float64)
    if not np.isfinite(found).all() or not penalty >= 0:
        raise OptionError(f"metrics {found} with the penalty {penalty}; expected finite ones, and 0 or more")
    spread = found.std()
    weights = np.exp(-penalty * (found - found.min()) / spread) if spread else np.ones(len(found))
    return weights / weights.sum()


def swad_window(losses: Sequence[float], converged: int = 3, patience: int = 6,
                tolerance: float = 1.3) -> tuple[int, int]:  # fmt: skip
    """Returns the first and the last place of the flat part of a loss curve.

    It begins at the first loss that is the least of the next ``converged`` ones, and ends before the first
    ``patience`` losses in a row that are all above ``tolerance`` times the mean of its first ones.

    Arguments:
        losses: The validation losses, above 0, in the order of training.
        converged: N_s.
        patience: N_e.
        tolerance: r; the paper has 1.2 on one data set.

    Raises:
        OptionError: If there are fewer losses than N_s, or one is not above 0.
    """
    found = np.asarray(losses, dtype=np.float64)
    if len(found) < converged or not (found > 0).all() or not np.isfinite(found).all():
        raise OptionError(f"SWAD needs {converged} finite losses above 0, not {losses}")
    windows = np.lib.stride_tricks.sliding_window_view(found, converged)
    begins = np.flatnonzero(windows[:, 0] <= windows.min(1))
    start = int(begins[0]) if len(begins) else len(found) - converged
    limit = tolerance * found[start : start + converged].mean()
    for place in range(start + 1, len(found) - patience + 1):
        if found[place : place + patience].min() > limit:
            return start, place - 1
    return start, len(found) - 1


def swad(
    losses: Sequence[float], converged: int = 3, patience: int = 6, tolerance: float = 1.3
) -> np.ndarray:
    """Returns the coefficients of the mean over the flat part of a loss curve, see `swad_window`.

    The paper averages every iteration of it; here it is the checkpoints.
    """
    start, end = swad_window(losses, converged, patience, tolerance)
    weights = np.zeros(len(losses))
    weights[start : end + 1] = 1
    return weights / weights.sum()
