"""Moving averages as what they weigh: which combination of some averages comes closest to another one.

An average of the weights is a sum over steps, sum_i w_i theta_i; the w_i, which add up to 1, are its profile. For those
of `parallel/ema.py` they follow from the decays of the updates: w_i = (1 - d_i) * product of d_j over the steps j after
i, with index 0 for the initial weights, d_0 = 0. A linear combination of averages has the same combination of their
profiles, so least squares over profiles says how to make an average that nobody kept (Karras et al. 2023, arXiv
2312.02696, section 3.2). They take the inner products of power functions from integrals; here they are sums over steps,
which hold for any decays, such as those of a power function up to a step and exponential from there on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from imm_scale.parallel.ema import WARMUP_WIDTH, power_function_exponent

Array = NDArray[np.float64]
_RCOND = 1e-13  # of averages that are all but the same, such as two that are both still warming up


@dataclass(frozen=True)
class Fit:
    """The nearest combination of some averages to another one.

    Attributes:
        coefficients: one for each average; they add up to 1.
        error: norm of the difference of the profiles over that of the profile aimed at; below 1e-7 it is rounding.
    """

    coefficients: tuple[float, ...]
    error: float


def power_function(steps: int, relative_width: float) -> Array:
    """log d_i of a power-function average, i = 0 .. steps: (steps + 1,); -inf at 0 and 1, which leave nothing."""
    exponent = power_function_exponent(relative_width) + 1.0
    with np.errstate(divide="ignore"):
        return np.concatenate([[-np.inf], exponent * np.log1p(-1.0 / np.arange(1, steps + 1))])


def tracked(steps: int, decay: float, warmup: bool) -> Array:
    """log d_i of an average as `ShardedEma` keeps it, i = 0 .. steps: (steps + 1,).

    Args:
        decay: of one step, its power included.
        warmup: whether it starts as a power function (`ema.warmup`).
    """
    constant = np.concatenate([[-np.inf], np.full(steps, np.log(decay))])
    return np.minimum(constant, power_function(steps, WARMUP_WIDTH)) if warmup else constant


def fit(log_decays: Array, kinds: Sequence[int], steps: Sequence[int], target: Array) -> Fit:
    """The combination of averages whose profile is nearest to that of another one, in the L2 norm over steps.

    Args:
        log_decays: (K, n + 1), log d_i of K kinds of averages.
        kinds, steps: of each of m averages, its kind and the step it was stored at, at most n.
        target: (n + 1,), log d_i of the average aimed at, whose profile ends at step n.
    """
    count, last = len(kinds), len(target) - 1
    products = _inner_products(np.vstack([log_decays, target]), [*kinds, len(log_decays)], [*steps, last])
    gram, aims, square = products[:count, :count], products[:count, count], products[count, count]
    norms = np.sqrt(gram.diagonal())
    # Minimum of |sum_j x_j p_j - p|^2 where sum_j x_j = 1: what is the same in all weights must come out as it is.
    bordered = np.block([[gram / np.outer(norms, norms), 1.0 / norms[:, None]], [1.0 / norms, 0.0]])
    x = np.linalg.lstsq(bordered, np.append(aims / norms, 1.0), rcond=_RCOND)[0][:count] / norms
    left = max(square - 2.0 * x @ aims + x @ gram @ x, 0.0)
    return Fit(tuple(x.tolist()), float(np.sqrt(left / square)))


def _inner_products(log_decays: Array, kinds: Sequence[int], steps: Sequence[int]) -> Array:
    """Sums over steps of products of two profiles, (m, m), from the last stretch between stored averages to the first.

    Within a stretch all averages of a kind that were stored later weigh steps alike, but for what is `left` of them.
    """
    kind, step = np.array(kinds), np.array(steps)
    products, left = np.zeros((len(kind), len(kind))), np.zeros(len(kind))
    for before, end in reversed(list(pairwise([-1, *sorted(set(steps))]))):
        left[step == end] = 1.0
        stretch = log_decays[:, before + 1 : end + 1]
        after = np.cumsum(stretch[:, :0:-1], axis=1)[:, ::-1]  # of all but the last step, which none comes after
        profiles = -np.expm1(stretch) * np.exp(np.pad(after, ((0, 0), (0, 1))))
        products += np.outer(left, left) * (profiles @ profiles.T)[np.ix_(kind, kind)]
        left *= np.exp(stretch.sum(axis=1))[kind]
    return products
