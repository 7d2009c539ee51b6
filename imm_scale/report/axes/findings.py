"""What the page says in numbers: scaling efficiencies against a baseline, and slopes of the excess along each axis."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from imm_scale.report.axes.efficiency import LEAST_CHANGE, At, Spread, efficiency, slope
from imm_scale.report.axes.points import Column, Point, Variant

Cost = Literal["work", "passes"]
_NOT_REACHED = "not reached"
_ERRORS = 2.0  # an excess below so many of its errors may be none, and its logarithm is noise


def cost(point: Point, kind: Cost) -> float | None:
    """Multiply-adds or passes of a point."""
    return point.work if kind == "work" else point.passes


def curve(variant: Variant, kind: Cost, seed: int | None = None) -> list[At]:
    """Its points that have this cost, of one seed or means over all."""
    points = [point for point in variant.points if cost(point, kind) is not None]
    if seed is None:
        return [At(float(cost(p, kind) or 0.0), p.value) for p in points]
    return [At(float(cost(p, kind) or 0.0), p.by_seed[seed].value) for p in points if seed in p.by_seed]


def _seeds(variants: Sequence[Variant]) -> list[int | None]:
    """What all of them can be told apart by: the seeds that every one has, or None for the means."""
    if len({one.seeds for one in variants}) > 1:
        return [None]
    shared = set.intersection(*({seed for point in one.points for seed in point.by_seed} for one in variants))
    return [*sorted(shared)] if len(shared) > 1 else [None]


def _spread_of(variants: Sequence[Variant]) -> str:
    """Whose spread is shown; without seeds that all share, there is none."""
    seeds = _seeds(variants)
    return "no spread" if seeds == [None] else f"{len(seeds)} {variants[0].seeds}"


@dataclass(frozen=True)
class Scaling:
    """A variant against the baseline, at the baseline's best value.

    Attributes:
        target: the mean of that value over seeds.
        work, passes: what the baseline needs over what the variant needs, in words.
        seeds: over which.
    """

    variant: str
    target: float
    work: str
    passes: str
    seeds: str


def scalings(column: Column) -> list[Scaling]:
    """Of all variants but the baseline."""
    base = column.baseline
    target = min(point.value for point in base.points)
    others = [one for one in column.variants if one is not base]
    return [
        Scaling(one.name, target, _scaling(base, one, "work"), _scaling(base, one, "passes"), _spread_of([base, one]))
        for one in others
    ]


def _scaling(base: Variant, ours: Variant, kind: Cost) -> str:
    if not curve(base, kind) or not curve(ours, kind):
        return "not known: older files"
    curves = [(curve(base, kind, seed), curve(ours, kind, seed)) for seed in _seeds([base, ours])]
    each = [efficiency(theirs, mine) for theirs, mine in curves if theirs and mine]
    bound = any(one.is_bound for one in each)
    return Spread(tuple(one.ratio for one in each), bound).text(_NOT_REACHED, is_ratio=True)


@dataclass(frozen=True)
class Slope:
    """How the excess changes along one axis, the other held.

    Attributes:
        what: the variant, or the variants that differ in their blocks alone.
        axis: sequence or refinement.
        held: passes along the other axis.
        points: how many were fitted.
        work, passes: d log(excess) / d log(cost), in words.
        seeds: over which.
    """

    what: str
    axis: str
    held: float
    points: int
    work: str
    passes: str
    seeds: str


def slopes(column: Column) -> list[Slope]:
    """Along refinement of each variant, along the sequence of each family of variants; where there are two places."""
    found: list[Slope] = []
    for one in column.variants:
        found += _along("refinement", [one], lambda p: p.sequence, lambda p: p.refinement)
    for family in dict.fromkeys(one.family for one in column.variants):
        members = [one for one in column.variants if one.family == family]
        if len(members) > 1:
            found += _along("sequence", members, lambda p: p.refinement, lambda p: p.sequence)
    return found


Place = Callable[[Point], float]


def _along(axis: str, variants: Sequence[Variant], held: Place, moved: Place) -> Iterable[Slope]:
    every = [point for one in variants for point in one.points if point.excess is not None]
    for at in sorted({held(point) for point in every}):
        there = [point for point in every if held(point) == at]
        best = [
            min((p for p in there if moved(p) == place), key=lambda p: p.value)
            for place in sorted({moved(p) for p in there})
        ]
        if len(best) > 1:
            fitted, seeds = [point for point in best if _is_seen(point)], _seeds(variants)
            work, passes = _slope(fitted, "work", seeds), _slope(fitted, "passes", seeds)
            what = " and ".join(one.name for one in variants)
            yield Slope(what, axis, at, len(fitted), work, passes, _spread_of(variants))


def _is_seen(point: Point) -> bool:
    assert point.excess is not None
    of_mean = (point.error or 0.0) / math.sqrt(max(1, len(point.by_seed)))
    return point.excess > _ERRORS * of_mean


def _slope(points: Sequence[Point], kind: Cost, seeds: Sequence[int | None]) -> str:
    having = [point for point in points if cost(point, kind) is not None]
    if len(having) < 2:
        return f"not known: {len(having)} points are above {_ERRORS:g} errors"
    costs = [float(cost(point, kind) or 0.0) for point in having]
    if max(costs) < LEAST_CHANGE * min(costs):
        return f"not known: {kind} stays the same"
    values = tuple(slope(_excesses(having, costs, seed)) for seed in seeds)
    return Spread(values).text("not known")


def _excesses(points: Sequence[Point], costs: Sequence[float], seed: int | None) -> list[At]:
    pairs = list(zip(points, costs, strict=True))
    if seed is None:
        return [At(c, point.excess) for point, c in pairs if point.excess is not None]
    excesses = [(c, point.by_seed[seed].excess) for point, c in pairs if seed in point.by_seed]
    return [At(c, excess) for c, excess in excesses if excess is not None]
