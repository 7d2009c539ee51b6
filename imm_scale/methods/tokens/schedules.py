"""What revealing T tokens in L steps costs, and in which sizes it costs least, from the information profile alone.

The profile h_n, n = 0..T-1, is the mean entropy of a token not yet known given n others, over all sets of n. A sampler
whose steps draw their k_l tokens independently of each other given the n_l = k_1 + .. + k_{l-1} tokens before has
nll@L = sum_l k_l h_{n_l} under a random order; what is above H(x) = sum_n h_n is its excess,

    E(k) = sum_l sum_{j < k_l} (h_{n_l} - h_{n_l + j})            (1)
    E <= (ceil(T / L) - 1) (h_0 - h_{T-1})   for equal sizes      (2)
    D_l(n) = min_{a < n} D_{l-1}(a) + (n - a) h_a - sum_{a <= j < n} h_j      (3), whose D_L(T) is the least E

No loss, distillation or training of a net with such steps goes below E: it is in the data, not in the net.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imm_scale.methods.tokens import masking

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


def sizes_of(kind: str, length: int, steps: int) -> tuple[int, ...]:
    """Sizes of `uniform` or `cosine` steps, as the sampler has them."""
    return tuple(masking.visible_counts(kind, steps, length).diff().tolist())


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
    """Recursion (3) for 1, 2, .., `most` steps, a row of minima for each.

    Args:
        profile_T: (T,), non-increasing: rows of minima rest on it, and noise would be taken for structure.
        most: the largest number of steps; None for T.
    """
    length = len(profile_T)
    rows = length if most is None else most
    _check(length, rows)
    assert np.diff(profile_T).max(initial=0.0) < _ROUNDING, "fit the profile first: it rises"
    step = _Step(np.asarray(profile_T, np.float64))
    least_LE = np.full((rows, length + 1), np.inf)
    before_LE = np.zeros((rows, length + 1), np.int32)
    least_LE[0, 1:] = step.cost(np.zeros(length, np.int64), np.arange(1, length + 1))
    for row in range(1, rows):
        least_LE[row], before_LE[row] = step.added(least_LE[row - 1], row)
    return BestSchedules(least_LE[:, -1].copy(), before_LE)


_ROUNDING = 1e-9  # what a flat profile that was computed may rise by


class _Step:
    """One step more, for a profile h (T,)."""

    def __init__(self, profile_T: Floats):
        self._h_T, self._known_E = profile_T, np.concatenate([[0.0], np.cumsum(profile_T)])

    def cost(self, start: NDArray[np.int64], end: NDArray[np.int64]) -> Floats:
        """Excess of single steps from `start` to `end` tokens visible, arrays of one shape."""
        return (end - start) * self._h_T[start] - (self._known_E[end] - self._known_E[start])

    def added(self, least_E: Floats, done: int) -> tuple[Floats, NDArray[np.int32]]:
        """For every n > `done` the least over a < n of least_E[a] + cost(a, n), and that a; (T + 1,) each.

        cost(a, n + 1) - cost(a, n) = h_a - h_n falls with a, so that the best a never falls with n (a Monge array). The
        middle n of a range is searched first, and halves those of the others: T log T candidates in place of T^2, all
        ranges of a level at once.
        """
        length = len(self._h_T)
        best_E, before_E = np.full(length + 1, np.inf), np.zeros(length + 1, np.int32)
        first, last = np.array([done + 1]), np.array([length])
        low, high = np.array([done]), np.array([length - 1])
        while len(first):
            middle = (first + last) // 2
            best_E[middle], chosen = self._search(least_E, middle, low, np.minimum(high, middle - 1))
            before_E[middle] = chosen
            first, last = np.concatenate([first, middle + 1]), np.concatenate([middle - 1, last])
            low, high = np.concatenate([low, chosen]), np.concatenate([chosen, high])
            some = first <= last
            first, last, low, high = first[some], last[some], low[some], high[some]
        return best_E, before_E

    def _search(
        self, least_E: Floats, end: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]
    ) -> tuple[Floats, NDArray[np.int64]]:
        """For each `end` the least value of a from `low` to `high`, and the smallest a that has it."""
        counts = high - low + 1
        offsets = np.cumsum(counts) - counts
        which = np.repeat(np.arange(len(end)), counts)
        start = np.arange(len(which)) - (offsets - low)[which]
        values = least_E[start] + self.cost(start, end[which])
        least = np.minimum.reduceat(values, offsets)
        found = np.flatnonzero(values == least[which])[::-1]  # backwards: of several a the smallest is written last
        chosen = np.empty(len(end), np.int64)
        chosen[which[found]] = start[found]
        return least, chosen
