"""How much less one curve costs than another for the same quality, and how fast quality improves with work.

A curve is a set of (cost, value) of which less is better. Between two points of its lower envelope the value is taken
to be linear in the logarithm of the cost.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class At(NamedTuple):
    """A value at a cost, both less the better."""

    cost: float
    value: float


def envelope(points: Iterable[At]) -> list[At]:
    """The points that are better than every cheaper one, by cost."""
    best: list[At] = []
    for point in sorted(points):
        if not best or point.value < best[-1].value:
            best.append(point)
    return best


class Reached(NamedTuple):
    """The cost at which a curve reaches a value; where its cheapest point is better, the least cost is not known."""

    cost: float
    is_bound: bool


def cost_of(points: Iterable[At], value: float) -> Reached | None:
    """None where the value is not reached."""
    lower = envelope(points)
    for before, point in zip([None, *lower], lower, strict=False):
        if point.value <= value:
            if before is None:
                return Reached(point.cost, point.value < value)
            share = (before.value - value) / (before.value - point.value)
            return Reached(math.exp(math.log(before.cost) + share * math.log(point.cost / before.cost)), False)
    return None


def between(points: Iterable[At], count: int = 16) -> list[At]:
    """The lower envelope with `count` - 1 points more in each gap, as it is read off."""
    lower, drawn = envelope(points), list[At]()
    for before, point in itertools.pairwise(lower):
        for share in np.linspace(0, 1, count, endpoint=False):
            cost = before.cost * (point.cost / before.cost) ** share
            drawn.append(At(float(cost), float(before.value + share * (point.value - before.value))))
    return drawn + lower[-1:]


@dataclass(frozen=True)
class Efficiency:
    """What the baseline costs over what the other one costs, at the baseline's best value.

    Attributes:
        target: that value.
        baseline, ours: the costs; None where the value is not reached.
        is_bound: whether `ours` may be less, and the ratio more.
    """

    target: float
    baseline: float
    ours: float | None
    is_bound: bool

    @property
    def ratio(self) -> float | None:
        """None where the value is not reached."""
        return None if self.ours is None else self.baseline / self.ours


def efficiency(baseline: Iterable[At], ours: Iterable[At]) -> Efficiency:
    """Of two curves; the baseline has a point at least."""
    best = envelope(baseline)[-1]
    reached = cost_of(ours, best.value)
    if reached is None:
        return Efficiency(best.value, best.cost, None, False)
    return Efficiency(best.value, best.cost, reached.cost, reached.is_bound)


@dataclass(frozen=True)
class Spread:
    """One number by seed.

    Attributes:
        values: one a seed, None where it does not exist; of means over seeds, one alone.
        is_bound: whether it is at least so much.
    """

    values: tuple[float | None, ...]
    is_bound: bool = False

    @property
    def known(self) -> list[float]:
        """Those that exist."""
        return [value for value in self.values if value is not None]

    def text(self, absent: str, is_ratio: bool = False) -> str:
        """In words: the mean (of ratios the geometric one) with the range over seeds, or what is absent of which."""
        known = self.known
        if not known:
            return absent
        mean = statistics.geometric_mean(known) if is_ratio else statistics.fmean(known)
        said = f"{'at least ' * self.is_bound}{mean:.3g}"
        if len(self.values) == 1:
            return said
        said += f" ({min(known):.3g} to {max(known):.3g})"
        missing = len(self.values) - len(known)
        return said if not missing else f"{absent} by {missing} of {len(self.values)}; of the others {said}"


LEAST_CHANGE = 1.1  # of the cost, along an axis: a slope over less says nothing


def slope(points: Sequence[At]) -> float | None:
    """d log(value) / d log(cost) by least squares; None of values at one cost, or fewer than two above 0."""
    points = [point for point in points if point.value > 0 and point.cost > 0]
    costs = [point.cost for point in points]
    if len(points) < 2 or max(costs) < LEAST_CHANGE * min(costs):
        return None
    return float(np.polyfit(np.log(costs), np.log([point.value for point in points]), 1)[0])
