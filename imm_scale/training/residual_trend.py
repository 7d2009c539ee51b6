"""Whether the part of a loss that holds s before t comes apart while flow matching, at s = t, stands still.

Losses of flow maps weight their residual so that their value says nothing; what diverges late in training is the term
with the derivative of the net, in spikes that come ever closer (reported of improved MeanFlow and MeanFlow).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

STEPS = 1000  # of steady growth
_PARTS = 4  # of that time, each of which must be above the one before
_LEAST_RECORDS = 2  # in a part
_GROWTH, _FLAT = 1.25, 1.1  # over these steps, from the first part to the last
_APART = ("residual_gap_0_33", "residual_gap_33_67", "residual_gap_67_100")
_EQUAL = ("residual_gap_0", "velocity_error_gap_0_33", "velocity_error_gap_33_67", "velocity_error_gap_67_100")


class _Point(NamedTuple):
    step: int
    apart: float
    equal: float


class ResidualTrend:
    """Looks at the records of a run, one after another, since this process began."""

    def __init__(self) -> None:
        self._points: list[_Point] = []

    def warning(self, record: Mapping[str, Any]) -> str | None:
        """A sentence if the residual has grown for `STEPS` steps up to this record; then not again for as many."""
        apart, equal = _mean(record, _APART), _mean(record, _EQUAL)
        if apart is None or equal is None:
            return None
        self._points.append(_Point(record["step"], apart, equal))
        recent = [point for point in self._points if point.step > record["step"] - STEPS]
        covered = len(recent) < len(self._points)  # a point lies before them
        self._points = self._points[-len(recent) - 1 :]
        parts = _split(recent, record["step"])
        if not covered or min(map(len, parts)) < _LEAST_RECORDS:
            return None
        apart_parts = [statistics.geometric_mean([p.apart for p in part]) for part in parts]
        equal_parts = [statistics.geometric_mean([p.equal for p in part]) for part in parts]
        growth, drift = apart_parts[-1] / apart_parts[0], equal_parts[-1] / equal_parts[0]
        grows = growth >= _GROWTH and apart_parts == sorted(apart_parts)
        if not grows or not 1 / _FLAT <= drift <= _FLAT:
            return None
        self._points.clear()
        return (
            f"step {record['step']}: the residual of samples with s before t has grown {growth:.2f}-fold over "
            f"{STEPS} steps, while flow matching's at s = t is flat: what usually helps is a lower learning rate, a "
            "larger method.times.equal, train.grad_clip, or going on from an earlier checkpoint"
        )


def _mean(record: Mapping[str, Any], names: Sequence[str]) -> float | None:
    """Of what there is under the names: above 0 and finite, or None."""
    values = [record[name] for name in names if record.get(name) is not None]
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        return None
    return statistics.fmean(values)


def _split(points: Sequence[_Point], last: int) -> list[list[_Point]]:
    parts: list[list[_Point]] = [[] for _ in range(_PARTS)]
    for point in points:
        parts[_PARTS - 1 - (last - point.step) * _PARTS // STEPS].append(point)
    return parts
