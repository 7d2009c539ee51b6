"""The paired Brier score of short windows of tokens, for samplers whose likelihood nobody knows.

For held-out x and two independent draws y, y' in its context,

    E[ 1{y = x} + 1{y' = x} - 1{y = y'} ] = 2 sum_w p(w) q(w) - sum_w q(w)^2,

largest for q = p alone (strictly proper), and the mean over samples is unbiased. Sampling with less noise than the data
has does not raise it: of four equal hands of two words the truth gets 1/4, always the same hand -1/2. CALM's BrierLM
is the geometric mean of windows of 1 to 4 tokens.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from imm_scale.evaluation.tokens import estimates
from imm_scale.evaluation.tokens.estimates import Estimate

WINDOWS = (1, 2, 3, 4)


def paired_brier(x_NT: Tensor, y_NT: Tensor, other_NT: Tensor, windows: Sequence[int] = WINDOWS) -> dict[int, Estimate]:
    """The score by length of window, each the mean over all places of a window and over samples.

    Args:
        x_NT: held-out tokens, (N, T), without what was given to the sampler.
        y_NT, other_NT: two draws in the context of each row, (N, T), independent of each other.
        windows: lengths; those longer than T are left out.

    Returns:
        {length: score}, standard errors over the N samples, of which there are at least two.
    """
    assert x_NT.shape == y_NT.shape == other_NT.shape, (x_NT.shape, y_NT.shape, other_NT.shape)
    lengths = [window for window in windows if window <= x_NT.shape[1]]
    return {window: estimates.mean(_scores(x_NT, y_NT, other_NT, window)) for window in lengths}


def _scores(x_NT: Tensor, y_NT: Tensor, other_NT: Tensor, window: int) -> Tensor:
    """(N,) mean score of a sample's windows."""
    first, second, between = (_same(a, b, window) for a, b in ((x_NT, y_NT), (x_NT, other_NT), (y_NT, other_NT)))
    return (first + second - between).mean(dim=1)


def _same(a_NT: Tensor, b_NT: Tensor, window: int) -> Tensor:
    """(N, T - window + 1): 1 where all tokens of the window agree."""
    return (a_NT == b_NT).unfold(1, window, 1).all(dim=-1).double()


def geometric_mean(scores: Mapping[int, Estimate]) -> float | None:
    """One number of all windows; None where a score is not above 0, as by chance or for a collapsed sampler."""
    values = [score.value for score in scores.values()]
    if min(values) <= 0:
        return None
    return math.exp(sum(map(math.log, values)) / len(values))
