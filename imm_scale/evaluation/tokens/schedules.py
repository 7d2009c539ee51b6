"""What revealing T tokens in L steps costs, and in which sizes it costs least, from the information profile alone.

The profile h_n, n = 0..T-1, is the mean entropy of a token not yet known given n others, over all sets of n. A sampler
whose steps draw their k_l tokens independently of each other given the n_l = k_1 + .. + k_{l-1} tokens before has
nll@L = sum_l k_l h_{n_l} under a random order; what is above H(x) = sum_n h_n is its excess,

    E(k) = sum_l sum_{j < k_l} (h_{n_l} - h_{n_l + j})            (1)
    E <= (ceil(T / L) - 1) (h_0 - h_{T-1})   for equal sizes      (2)
    D_l(n) = min_{a < n} D_{l-1}(a) + (n - a) h_a - sum_{a <= j < n} h_j      (3), whose D_L(T) is the least E

No loss, distillation or training of a net with such steps goes below E: it is in the data, not in the net.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def _starts(sizes: Sequence[int], length: int) -> NDArray[np.int64]:
    """(L,) tokens visible before each step."""
    k_L = np.asarray(sizes, np.int64)
    assert k_L.ndim == 1 and len(k_L) and k_L.min() >= 1 and k_L.sum() == length, f"sizes {sizes} of {length} tokens"
    return np.cumsum(k_L) - k_L


def step_weights(sizes: Sequence[int], length: int) -> Floats:
    """(T,) weights w with nll@L = w . h: k_l at n_l, 0 elsewhere."""
    weights_T = np.zeros(length)
    weights_T[_starts(sizes, length)] = sizes
    return weights_T


def nll(profile_T: Floats, sizes: Sequence[int]) -> float:
    """nll@L of steps that draw products, in nats a sequence. `profile_T` is (T,) from 0 tokens visible on."""
    return float(step_weights(sizes, len(profile_T)) @ profile_T)


def excess(profile_T: Floats, sizes: Sequence[int]) -> float:
    """E(k) of formula (1), in nats a sequence. `profile_T` is (T,); 0 for T steps, the total correlation for one."""
    return nll(profile_T, sizes) - float(np.sum(profile_T))


def bound(profile_T: Floats, steps: int) -> float:
    """Bound (2) of the excess of equal sizes, for a non-increasing (T,) profile.

    Of L that does not divide T the largest step counts, hence the ceiling: with T / L it would be wrong.
    """
    largest = -(-len(profile_T) // steps)
    return (largest - 1) * float(profile_T[0] - profile_T[-1])


def equal_sizes(length: int, steps: int) -> tuple[int, ...]:
    """Sizes that differ by one at most."""
    _check(length, steps)
    ends = [length * step // steps for step in range(steps + 1)]
    return tuple(b - a for a, b in itertools.pairwise(ends))


def cosine_sizes(length: int, steps: int) -> tuple[int, ...]:
    """Sizes that grow: T cos(pi l / 2L) tokens are masked after step l, rounded, one a step at least."""
    _check(length, steps)
    ends = [0]
    for step in range(1, steps + 1):
        wanted = length - round(length * float(np.cos(np.pi * step / (2 * steps))))
        ends.append(min(max(wanted, ends[-1] + 1), length - (steps - step)))
    return tuple(b - a for a, b in itertools.pairwise(ends))


def _check(length: int, steps: int) -> None:
    assert 1 <= steps <= length, f"{steps} steps for {length} tokens"


@dataclass(frozen=True)
class BestSchedules:
    """The least excess and its sizes for every number of steps up to a largest one.

    Attributes:
        excess_L: (L,) least E of formula (1), in nats; [l - 1] for l steps.
    """

    excess_L: Floats
    _before: NDArray[np.int32]  # (L, T + 1): where the last of l steps to n begins

    def sizes(self, steps: int) -> tuple[int, ...]:
        """The sizes of the best schedule of so many steps."""
        end, sizes = self._before.shape[1] - 1, []
        for step in range(steps, 0, -1):
            start = int(self._before[step - 1, end])
            sizes.append(end - start)
            end = start
        return tuple(reversed(sizes))


def best_schedules(profile_T: Floats, most: int | None = None) -> BestSchedules:
    """Recursion (3) for 1, 2, .., `most` steps at once: a row of minima over a (T, T + 1) table for each.

    Args:
        profile_T: (T,), non-increasing for the sizes to mean something; noise would be taken for structure.
        most: the largest number of steps; None for T.
    """
    length = len(profile_T)
    rows = length if most is None else most
    _check(length, rows)
    cost_TE = _costs(profile_T)
    least_LE = np.empty((rows, length + 1))
    before_LE = np.zeros((rows, length + 1), np.int32)
    least_LE[0] = cost_TE[0]
    for row in range(1, rows):
        through_TE = least_LE[row - 1, :-1, None] + cost_TE
        before_LE[row] = through_TE.argmin(axis=0)
        least_LE[row] = np.take_along_axis(through_TE, before_LE[row][None].astype(np.intp), axis=0)[0]
    return BestSchedules(least_LE[:, -1].copy(), before_LE)


def _costs(profile_T: Floats) -> Floats:
    """(T, T + 1): the excess of one step from a to n tokens visible; infinite for n <= a."""
    length = len(profile_T)
    known_E = np.concatenate([[0.0], np.cumsum(profile_T)])
    start_T1, end_E = np.arange(length)[:, None], np.arange(length + 1)
    cost_TE = (end_E - start_T1) * np.asarray(profile_T)[:, None] - (known_E - known_E[:-1, None])
    return np.where(end_E > start_T1, cost_TE, np.inf)
