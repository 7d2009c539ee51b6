"""Quality against cost: what a report plots of many evaluations."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from imm_scale.evaluation.records import Conditions, conditions, error_of


@dataclass(frozen=True)
class Point:
    """The best value of one metric at one number of function evaluations."""

    function_evaluations: int
    steps: int
    guidance_scale: float
    value: float
    error: float | None


# Metrics of which more is better; of all others less is.
_MORE_IS_BETTER = ("precision", "recall", "density", "coverage", "inception_score", "class_score")


def more_is_better(metric: str) -> bool:
    """Whether a larger value of the metric is the better one."""
    return metric.startswith(_MORE_IS_BETTER)


def setting(evaluation: Mapping[str, Any], result: Mapping[str, Any]) -> Conditions:
    """The conditions of a result but for its guidance, which is a choice at each cost, and its metric."""
    return {k: v for k, v in conditions(evaluation, result).items() if k not in ("guidance", "metric")}


def settings(evaluations: Iterable[Mapping[str, Any]]) -> list[Conditions]:
    """All that results were measured under, what most results share first."""
    measured = [setting(evaluation, result) for evaluation in evaluations for result in evaluation["results"]]
    unlike = [one for i, one in enumerate(measured) if one not in measured[:i]]
    return sorted(unlike, key=lambda one: -measured.count(one))


def curves(evaluations: Iterable[Mapping[str, Any]], only: Conditions | None = None) -> dict[str, list[Point]]:
    """{metric: points by function evaluations} of one checkpoint's evaluations, measured alike.

    Several guidance scales, grids or samplers at one cost are one choice: the best of them stands for it. Other
    counts, references, feature networks or precisions are no such choice.

    Args:
        only: one of `settings`; None takes what most results share.
    """
    evaluations = list(evaluations)
    only = only or next(iter(settings(evaluations)), {})
    best: dict[str, dict[int, Point]] = {}
    for evaluation in evaluations:
        for result in evaluation["results"]:
            if setting(evaluation, result) != only:
                continue
            for metric, one in result["measures"].items():
                cost = result["function_evaluations"]
                point = Point(cost, result["steps"], result["guidance_scale"], one["value"], error_of(one))
                known = best.setdefault(metric, {}).setdefault(cost, point)
                if (point.value > known.value) == more_is_better(metric) and point.value != known.value:
                    best[metric][cost] = point
    return {metric: [points[cost] for cost in sorted(points)] for metric, points in best.items()}
