"""Quality against cost: what a report plots of many evaluations."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """The best value of one metric at one number of function evaluations."""

    function_evaluations: int
    steps: int
    guidance_scale: float
    value: float
    error: float


# Metrics of which more is better; of all others less is.
_MORE_IS_BETTER = ("precision", "recall", "density", "coverage", "inception_score", "class_score")


def more_is_better(metric: str) -> bool:
    """Whether a larger value of the metric is the better one."""
    return metric.startswith(_MORE_IS_BETTER)


def curves(evaluations: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """{metric: points by function evaluations} of one checkpoint's evaluations.

    Several guidance scales, grids or samplers at one cost are one choice: the best of them stands for it. Other
    precisions are no such choice: they have curves of their own.
    """
    best: dict[str, dict[int, Point]] = {}
    for evaluation in evaluations:
        for result in evaluation["results"]:
            for metric, one in result["measures"].items():
                cost = result["function_evaluations"]
                point = Point(cost, result["steps"], result["guidance_scale"], one["value"], one["error"])
                known = best.setdefault(metric, {}).setdefault(cost, point)
                if (point.value > known.value) == more_is_better(metric) and point.value != known.value:
                    best[metric][cost] = point
    return {metric: [points[cost] for cost in sorted(points)] for metric, points in best.items()}
