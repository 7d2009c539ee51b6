"""The sample order as its definition reads, one step at a time."""

import numpy as np
from numpy.typing import NDArray


def batch_indices(
    order: NDArray[np.int64], global_batch_size: int, step_in_epoch: int, positions: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Global sample indices of some positions of a step: position p of step k takes order[p * L + k]."""
    steps = len(order) // global_batch_size
    assert 0 <= step_in_epoch < steps
    return order[positions * steps + step_in_epoch]
