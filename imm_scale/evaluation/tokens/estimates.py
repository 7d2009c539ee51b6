"""A number estimated from samples, with its standard error."""

import math
from typing import NamedTuple

from torch import Tensor


class Estimate(NamedTuple):
    """What was measured, and the standard error of it."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} +- {self.error:.4f}"


def mean(values_N: Tensor) -> Estimate:
    """The mean of (N,) independent values, N at least 2."""
    assert values_N.ndim == 1 and len(values_N) >= 2, values_N.shape
    values_N = values_N.double()
    return Estimate(float(values_N.mean()), float(values_N.std()) / math.sqrt(len(values_N)))
