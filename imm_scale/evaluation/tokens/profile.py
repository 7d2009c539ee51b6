"""The information profile of a masked model from scores of held-out samples, and what schedules of any L cost it.

A score is the mean of -log p over the tokens that were masked when n random others were visible. What is reported
is linear in the means hhat_n, so its standard error is exact also where a sample was scored at several n: each sample's
share of it is summed, and samples are independent (`Profile.of`).

Sizes fitted to a noisy profile would be worse than they could be, and look better than they are. So they are chosen by
a smooth, non-increasing fit, each half of the samples chooses some, and the other half says what they cost; the mean of
both is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import make_smoothing_spline
from scipy.optimize import isotonic_regression

from imm_scale.evaluation.tokens.estimates import Estimate
from imm_scale.methods.tokens import schedules
from imm_scale.methods.tokens.schedules import Floats

ALL = 256  # the longest sequence whose every n is scored
NODES = 64  # how many n of longer ones
ALARM_ERRORS = 3.0
_SPLINE = 5  # the fewest nodes that scipy smooths
_SPACING = 0.2  # between nodes, in the mean
_NOTHING = 1e-9  # nats: what sums of equal numbers differ by


def nodes(length: int) -> NDArray[np.int64]:
    """Numbers of visible tokens to score at: all of 0..T-1, or 64 that are dense at both ends, where profiles bend."""
    if length <= ALL:
        return np.arange(length)
    between = (1 - np.cos(np.pi * np.arange(NODES) / (NODES - 1))) / 2
    return np.unique(np.rint((length - 1) * between).astype(np.int64))


def between(length: int) -> Floats:
    """(T, M) weights of the values at `nodes(T)` in those at every n: on the lines between neighbours."""
    node_M = nodes(length)
    return np.stack([np.interp(np.arange(length), node_M, one) for one in np.eye(len(node_M))], axis=1)


@dataclass(frozen=True)
class Scores:
    """A held-out pass: R scores, each of a sample at a number of visible tokens.

    Attributes:
        length: T.
        sample_R: (R,) which sample; its parity says in which half it is.
        visible_R: (R,) one of `nodes(T)`.
        score_R: (R,) mean of -log p over the T - n masked tokens, in nats.
    """

    length: int
    sample_R: NDArray[np.int64]
    visible_R: NDArray[np.int64]
    score_R: Floats

    def half(self, which: int) -> "Scores":
        """Those of even (0) or odd (1) samples."""
        chosen = self.sample_R % 2 == which
        return Scores(self.length, self.sample_R[chosen], self.visible_R[chosen], self.score_R[chosen])


class Profile:
    """Means of scores at each node, linear in between, and errors of all that is linear in them.

    Args:
        scores: at least two at every node.
    """

    def __init__(self, scores: Scores):
        self.length, self.nodes_M = scores.length, nodes(scores.length)
        self._node_R = np.searchsorted(self.nodes_M, scores.visible_R)
        assert np.array_equal(self.nodes_M[self._node_R], scores.visible_R), "scored between the nodes"
        self.count_M = np.bincount(self._node_R, minlength=len(self.nodes_M))
        assert self.count_M.min() >= 2, f"{self.count_M.min()} scores at a node: an error needs two"
        self.mean_M = np.bincount(self._node_R, scores.score_R, len(self.nodes_M)) / self.count_M
        # sum over a node of the squares of this is the squared standard error of its mean
        scale_M = 1 / np.sqrt(self.count_M * (self.count_M - 1.0))
        self._share_R = (scores.score_R - self.mean_M[self._node_R]) * scale_M[self._node_R]
        self._sample_R = scores.sample_R
        self._between_TM = between(self.length)

    def of(self, weights_T: Floats) -> Estimate:
        """sum_n w_n hhat_n of (T,) weights, and its standard error over samples."""
        weights_M = weights_T @ self._between_TM
        share_S = np.bincount(self._sample_R, weights_M[self._node_R] * self._share_R)
        return Estimate(float(weights_M @ self.mean_M), float(np.sqrt(np.square(share_S).sum())))

    def at(self, visible: int) -> Estimate:
        """hhat_n of one n."""
        return self.of(np.eye(1, self.length, visible)[0])

    def means(self) -> Floats:
        """(T,) hhat_n of every n."""
        return self._between_TM @ self.mean_M

    @property
    def nll(self) -> Estimate:
        """NLL_T = sum_n hhat_n: nats a sequence of one token at a time in random order; an upper bound of H(x)."""
        return self.of(np.ones(self.length))

    @property
    def fall(self) -> Estimate:
        """hhat_0 - hhat_{T-1}: what a token's own context says about it at most."""
        return self.of(np.eye(1, self.length, 0)[0] - np.eye(1, self.length, self.length - 1)[0])

    def fitted(self) -> Floats:
        """(T,) a smooth, non-increasing profile near to the means, which are weighted by their numbers of scores.

        A cubic spline, as smooth as generalized cross-validation finds best, then pooled where it still rises. Pooling
        alone leaves stairs of noise, and best sizes step from one to the next: of 32 scores a node they would cost more
        than equal sizes do. Both keep the weighted sum.
        """
        fit = isotonic_regression(self._smooth(), weights=self.count_M, increasing=False)
        return self._between_TM @ fit.x

    def _smooth(self) -> Floats:
        """(M,) of the spline."""
        count = len(self.nodes_M)
        if count < _SPLINE:
            return self.mean_M
        # scipy seeks the penalty from 0 to M, whatever the units: in these it reaches from no smoothing to a line.
        place_M = self.nodes_M / self.nodes_M[-1] * _SPACING * (count - 1)
        fit = make_smoothing_spline(place_M, self.mean_M, self.count_M / self.count_M.mean())
        return np.asarray(fit(place_M))

    def best_sizes(self, step_counts: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """{L: the sizes of L steps that cost least by the fit}."""
        # Of T steps there is one schedule, and its row of the table would be the longest to fill.
        most = max((count for count in step_counts if count < self.length), default=1)
        table = schedules.best_schedules(self.fitted(), most)
        return {count: table.sizes(count) if count < self.length else (1,) * self.length for count in step_counts}


@dataclass(frozen=True)
class ScheduleCost:
    """What one schedule costs a sampler whose steps draw their tokens independently.

    Attributes:
        kind: uniform, cosine or best.
        sizes: tokens of each step; the best ones as chosen by all samples.
        nll, excess: nll@L and what of it is above NLL_T, in nats a sequence.
    """

    steps: int
    kind: str
    sizes: tuple[int, ...]
    nll: Estimate
    excess: Estimate


def step_counts(length: int) -> list[int]:
    """1, 2, 4, 8, .. below T, and T."""
    return [2**i for i in range(length.bit_length()) if 2**i < length] + [length]


def schedule_costs(scores: Scores, steps: Sequence[int]) -> list[ScheduleCost]:
    """Equal, cosine and best sizes for each of these numbers of steps.

    Equal and cosine sizes are measured on all samples. So are the best ones, each half's choice on the other half.
    """
    everything, halves = Profile(scores), [Profile(scores.half(which)) for which in (0, 1)]
    chosen, *crossed = (one.best_sizes(steps) for one in (everything, *halves))
    costs = []
    for count in steps:
        uniform = schedules.sizes_of("uniform", scores.length, count)
        costs.append(_cost(everything, "uniform", uniform))
        costs.append(_cost(everything, "cosine", schedules.sizes_of("cosine", scores.length, count)))
        if count in (1, scores.length):  # there is one schedule
            costs.append(_cost(everything, "best", uniform))
        else:
            crosswise = zip(halves, reversed(crossed), strict=True)
            parts = [_cost(half, "best", other[count]) for half, other in crosswise]
            costs.append(_mean_of(parts, chosen[count]))
    return costs


def _cost(profile: Profile, kind: str, sizes: tuple[int, ...]) -> ScheduleCost:
    weights_T = schedules.step_weights(sizes, profile.length)
    return ScheduleCost(len(sizes), kind, sizes, profile.of(weights_T), profile.of(weights_T - 1))


def _mean_of(costs: Sequence[ScheduleCost], sizes: tuple[int, ...]) -> ScheduleCost:
    """The mean cost of schedules that were measured on different samples."""
    nll, excess = (_mean([getattr(cost, name) for cost in costs]) for name in ("nll", "excess"))
    return ScheduleCost(len(sizes), costs[0].kind, sizes, nll, excess)


def _mean(independent: Sequence[Estimate]) -> Estimate:
    values, errors = np.array(independent).T
    return Estimate(float(values.mean()), float(np.sqrt(np.square(errors).sum())) / len(values))


def floor(costs: Sequence[ScheduleCost]) -> dict[int, Estimate]:
    """{L: nats a sequence}: nll@L of the best sizes, which no training of a product head at L goes below.

    It holds for the conditionals that were measured. A better net has a lower profile, and a floor of its own; the
    excess above NLL_T is what training at these L, distilling or a better loss cannot remove, and a joint head can.
    """
    return {cost.steps: cost.nll for cost in costs if cost.kind == "best"}


def alarm(profile: Profile) -> str | None:
    """What to say of a net whose profile does not fall; None where it does."""
    fall = profile.fall
    least = max(ALARM_ERRORS * fall.error, _NOTHING)
    if profile.length == 1 or fall.value > least:
        return None
    return (
        f"the net predicts marginals only: h_0 - h_{profile.length - 1} = {fall.value:.4f} nats is not above "
        f"{least:.4f}, {ALARM_ERRORS:g} standard errors, so what is visible tells it nothing of what is masked. "
        "Train longer, or score more samples"
    )
