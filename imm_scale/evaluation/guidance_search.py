"""The best guidance for each step count, in few evaluations, and how sure that is.

The distance is a smooth function of the guidance scale w with one minimum, once chance is held fixed: each w is
measured with the same starting noises (common random numbers). Golden sections narrow the minimum down, jumps to the
vertex of the parabola through the best three points speed that up (Brent, "Algorithms for minimization without
derivatives", 1973, chapter 5). Differences between two w are judged seed by seed, so what the seeds share drops out.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from imm_scale.errors import UserError
from imm_scale.evaluation.records import with_error

_GOLDEN = (3.0 - math.sqrt(5.0)) / 2.0


@dataclass(frozen=True)
class Range:
    """What is asked for: `guidance=1.0:3.0 steps=1,2,4,8`."""

    low: float
    high: float
    steps: tuple[int, ...]


def parse(args: Sequence[str], default_steps: Sequence[int]) -> Range:
    """Raises UserError for other settings."""
    settings = dict(arg.partition("=")[::2] for arg in args)
    unknown = [arg for arg in args if arg.partition("=")[0] not in ("guidance", "steps")]
    if unknown or "guidance" not in settings:
        raise UserError(f"--search {' '.join(args)}: give guidance=LOW:HIGH, and steps=1,2,4 if you like")
    low, colon, high = settings["guidance"].partition(":")
    try:
        parsed = Range(
            float(low),
            float(high),
            tuple(int(n) for n in settings.get("steps", "").split(",") if n) or tuple(default_steps),
        )
    except ValueError as error:
        raise UserError(f"--search {' '.join(args)}: {error}; give guidance=1.0:3.0 steps=1,2,4") from error
    if not colon or not 0.0 <= parsed.low < parsed.high or min(parsed.steps) < 1:
        raise UserError(f"--search {' '.join(args)}: guidance must go from low to high, steps be at least 1")
    return parsed


@dataclass(frozen=True)
class Point:
    """Distances at one guidance scale, a value per seed."""

    guidance: float
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean distance over sampling seeds."""
        return statistics.fmean(self.values)


@dataclass(frozen=True)
class Best:
    """What a search found for one step count.

    Attributes:
        guidance, value: the best point measured, and its mean distance over seeds.
        error: standard error of that mean, None of one seed.
        at_end: whether it is an end of the range, so that the best may lie outside.
        not_worse: least and greatest measured guidance that the seeds cannot tell from the best (paired difference
            below two standard errors).
        points: all that was measured, by guidance.
    """

    steps: int
    guidance: float
    value: float
    error: float | None
    at_end: bool
    not_worse: tuple[float, float]
    points: tuple[Point, ...]

    def describe(self) -> str:
        """The best scale in a line, with the scales that are as good within two errors."""
        steps = f"{self.steps} step" + ("" if self.steps == 1 else "s")
        end = "; it is an end of the range: widen it" if self.at_end else ""
        return (
            f"{steps:>9}  best guidance {self.guidance:.3g}  {with_error(self.value, self.error)}  "
            f"({self._doubt()}; {len(self.points)} points{end})"
        )

    def _doubt(self) -> str:
        seeds, (low, high) = len(self.points[0].values), self.not_worse
        if seeds == 1:
            return "one seed tells no two points apart: give --repeats"
        doubt = "no other point measured comes within 2 errors" if low == high else f"{low:g} to {high:g} are as good"
        return f"{doubt} for {seeds} seeds"

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


def minimize(
    steps: int, measure: Callable[[float], tuple[float, ...]], low: float, high: float, tolerance: float, most: int
) -> Best:
    """The guidance with the least mean distance in [low, high].

    Args:
        measure: distances at a guidance scale, one per seed, always with the same seeds.
        tolerance: the search stops when the minimum is known this closely.
        most: evaluations at most, ends included; at least 3.
    """
    points: dict[float, Point] = {}

    def at(guidance: float) -> Point:
        guidance = round(guidance, 3)  # so that a search that is repeated meets its own evaluations
        if guidance not in points:
            points[guidance] = Point(guidance, measure(guidance))
        return points[guidance]

    at(low), at(high), at(low + _GOLDEN * (high - low))
    while len(points) < most:
        proposal = _next(sorted(points.values(), key=lambda point: point.guidance), tolerance)
        if proposal is None or round(proposal, 3) in points:
            break
        at(proposal)
    return _best(steps, sorted(points.values(), key=lambda point: point.guidance))


def _next(points: Sequence[Point], tolerance: float) -> float | None:
    """Where to measure next: between the neighbours of the best point so far; None when they are close enough."""
    best = min(range(len(points)), key=lambda i: points[i].mean)
    left, right = points[max(best - 1, 0)].guidance, points[min(best + 1, len(points) - 1)].guidance
    here = points[best].guidance
    if max(here - left, right - here) <= tolerance:
        return None
    vertex = _vertex(points, best)
    if vertex is not None and min(abs(vertex - point.guidance) for point in points) >= tolerance / 2:
        return vertex
    # The larger of the two gaps, cut by the golden section next to the best point.
    return here + _GOLDEN * (right - here) if right - here > here - left else here - _GOLDEN * (here - left)


def _vertex(points: Sequence[Point], best: int) -> float | None:
    """Of the parabola through the best point and its neighbours, where it opens upwards and lies between them."""
    if best in (0, len(points) - 1):
        return None
    (x0, y0), (x1, y1), (x2, y2) = ((point.guidance, point.mean) for point in points[best - 1 : best + 2])
    first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (second - first) / (x2 - x0)
    if curvature <= 0.0:
        return None
    vertex = 0.5 * (x0 + x1 - first / curvature)
    return vertex if x0 < vertex < x2 else None


def _best(steps: int, points: Sequence[Point]) -> Best:
    best = min(points, key=lambda point: point.mean)
    as_good = [point.guidance for point in points if not _worse(point, best)]
    return Best(
        steps=steps,
        guidance=best.guidance,
        value=best.mean,
        error=_standard_error(best.values) if len(best.values) > 1 else None,
        at_end=best in (points[0], points[-1]),
        not_worse=(min(as_good), max(as_good)),
        points=tuple(points),
    )


def _worse(point: Point, best: Point) -> bool:
    """Whether the seeds agree that a point is worse: paired differences two standard errors above 0."""
    if point is best:
        return False
    differences = [mine - theirs for mine, theirs in zip(point.values, best.values, strict=True)]
    return statistics.fmean(differences) > 2.0 * _standard_error(differences)


def _standard_error(values: Sequence[float]) -> float:
    """Infinite for one value: a single seed tells no two points apart."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
