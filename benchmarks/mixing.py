"""How well an order of samples mixes, and what it costs to read: pure functions of plan.py's order."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imm_scale.data import sample_order
from imm_scale.data.sample_order import BlockTable


@dataclass(frozen=True)
class Mixture:
    """Of the batches of an epoch, each beside what a full shuffle gives on average.

    Attributes:
        groups: distinct groups (shards, or classes) in a batch.
        groups_shuffled: the same for batches drawn at random without replacement.
    """

    groups: float
    groups_shuffled: float


def _batches(order: NDArray[np.int64], batch: int) -> NDArray[np.int64]:
    """(L, B) sample indices of the steps of an epoch."""
    steps = sample_order.steps_per_epoch(batch, len(order))
    return order[: batch * steps].reshape(batch, steps).T


def mixture(order: NDArray[np.int64], batch: int, group_N: NDArray[np.int64], steps: int = 20) -> Mixture:
    """Distinct groups in batches spread over the epoch, and in as many of a full shuffle (fixed seed)."""
    chosen = _batches(order, batch)
    chosen = chosen[:: max(1, len(chosen) // steps)]
    shuffled = np.random.default_rng(0).permutation(len(order))[: chosen.size].reshape(chosen.shape)
    here, random = (np.mean([len(np.unique(group_N[row])) for row in rows]) for rows in (chosen, shuffled))
    return Mixture(float(here), float(random))


def meeting_again(first: NDArray[np.int64], second: NDArray[np.int64], batch: int, window: int = 1) -> float:
    """How many times as often as under a full shuffle two samples that met in one epoch (N,) meet in the next.

    To meet is to be in batches of which at most `window` - 1 lie between, counted in windows of that many steps. 1 is
    a full shuffle; N / (window * B) would be the same windows over again.
    """

    def window_of(order: NDArray[np.int64]) -> NDArray[np.int64]:
        batches = _batches(order, batch)
        place = np.full(len(order), -1)
        place[batches] = np.arange(len(batches))[:, None] // window
        return place

    before, after = window_of(first), window_of(second)
    both = (before >= 0) & (after >= 0)
    _, size_before = np.unique(before[both], return_counts=True)
    _, size_after = np.unique(after[both], return_counts=True)
    _, size_both = np.unique(before[both] * (after.max() + 1) + after[both], return_counts=True)
    pairs = np.array([(n.astype(float) * (n - 1)).sum() for n in (size_before, size_after, size_both)])
    total = float(both.sum())
    return float(pairs[2] * total * (total - 1) / (pairs[0] * pairs[1]))


def read_amplification(order: NDArray[np.int64], table: BlockTable, batch: int, world: int) -> float:
    """Samples fetched over samples used in an epoch (N,), over all ranks of a world that share `batch` positions.

    Samples of a shard take the same number of bytes, so it is also bytes fetched over the bytes of the tar used.
    """
    steps = sample_order.steps_per_epoch(batch, len(order))
    indices = order[: batch * steps].reshape(batch, steps)
    fetched = 0
    for rank in range(world):
        mine = sample_order.rank_groups(batch, rank, world)
        visits = sample_order.schedule(indices[mine.start : mine.stop], table)
        fetched += int(table.size[visits.block].sum())
    return fetched / indices.size
