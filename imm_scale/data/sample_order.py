"""Which rank runs which group, and which sample stands where: pure functions of counts, the seed and the clock.

Names: B global batch size, M particles per group, G = B / M groups, W ranks, N samples, L = N // B steps per epoch.
Nothing here reads a file or knows how many loaders there are, so the order of samples is the same on any machine.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from imm_scale import rng
from imm_scale.errors import UserError


def rank_groups(num_groups: int, rank: int, world_size: int) -> range:
    """The contiguous groups of one rank; over all ranks every group once, sizes differing by at most one.

    Raises:
        UserError: more ranks than groups, or a rank outside the world.
    """
    _check_ranks_fit(num_groups, world_size)
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} is outside a world of {world_size}: ranks count from 0 to {world_size - 1}")
    return range(rank * num_groups // world_size, (rank + 1) * num_groups // world_size)


def _check_ranks_fit(num_groups: int, world_size: int) -> None:
    if world_size < 1:
        raise UserError(f"world size {world_size}: at least one rank is needed")
    if world_size > num_groups:
        raise UserError(
            f"{world_size} ranks for {num_groups} groups: at most {num_groups} ranks fit. Use fewer ranks, "
            "a larger train.global_batch_size or a smaller method.particles"
        )


@dataclass(frozen=True)
class Layout:
    """How a global batch is spread over ranks and micro-batches.

    A slot holds one group. Every rank runs the same number of slots, `accumulation` micro-batches of
    `slots_per_micro_batch` each; a rank with fewer groups pads its last slots with weight 0.

    Raises:
        UserError: sizes that are not positive, do not divide, or do not fit.
    """

    global_batch_size: int
    particles: int
    world_size: int
    micro_batch_size: int

    def __post_init__(self) -> None:
        for field in ("global_batch_size", "particles", "world_size", "micro_batch_size"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} is {getattr(self, field)}: it must be at least 1")
        for field in ("global_batch_size", "micro_batch_size"):
            value = getattr(self, field)
            if value % self.particles:
                raise UserError(
                    f"train.{field} is {value}, not a multiple of method.particles = {self.particles}: "
                    f"use {max(value // self.particles, 1) * self.particles}"
                )
        if self.micro_batch_size > self.global_batch_size:
            raise UserError(
                f"train.micro_batch_size {self.micro_batch_size} is larger than train.global_batch_size "
                f"{self.global_batch_size}: lower it to {self.global_batch_size} or less"
            )
        _check_ranks_fit(self.num_groups, self.world_size)

    @property
    def num_groups(self) -> int:
        """G, over all ranks."""
        return self.global_batch_size // self.particles

    @property
    def slots_per_rank(self) -> int:
        """The most groups any rank has."""
        return _ceil_div(self.num_groups, self.world_size)

    @property
    def accumulation(self) -> int:
        """Micro-batches per step."""
        return _ceil_div(self.slots_per_rank, self.micro_batch_size // self.particles)

    @property
    def samples_per_micro_batch(self) -> int:
        """Samples in a micro-batch of one rank, those of empty slots included."""
        return self.slots_per_micro_batch * self.particles

    @property
    def slots_per_micro_batch(self) -> int:
        """Groups in a micro-batch of one rank, empty slots included."""
        return _ceil_div(self.slots_per_rank, self.accumulation)

    @property
    def alignment(self) -> int:
        """The largest number of groups of which every micro-batch holds a whole number from a multiple on; 1 if none.

        Groups are numbered over the run, so whole steps have to be multiples of it as well.
        """
        even = self.num_groups == self.world_size * self.slots
        return math.gcd(self.num_groups, self.slots_per_micro_batch) if even else 1

    @property
    def slots(self) -> int:
        """Slots a rank runs in a step, padded ones among them."""
        return self.accumulation * self.slots_per_micro_batch


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


@dataclass(frozen=True)
class BlockTable:
    """Blocks of neighbouring samples: first global sample index and size of each, int64 arrays of one length."""

    start: NDArray[np.int64]
    size: NDArray[np.int64]

    def block_of(self, sample: NDArray[np.int64]) -> NDArray[np.int64]:
        """The block of each global sample index, of the same shape."""
        return np.searchsorted(self.start, sample, side="right") - 1


def block_table(shard_samples: list[int], block_samples: int) -> BlockTable:
    """Cuts each shard into blocks of `block_samples`, the last one of a shard perhaps shorter.

    Args:
        shard_samples: samples per shard; global sample indices count through the shards in this order.

    Raises:
        UserError: block_samples below 1.
    """
    if block_samples < 1:
        raise UserError(f"data.block_samples is {block_samples}: it must be at least 1")
    starts: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    sizes: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    first = 0
    for samples in shard_samples:
        start = np.arange(0, samples, block_samples, dtype=np.int64)
        starts.append(first + start)
        sizes.append(np.minimum(block_samples, samples - start))
        first += samples
    return BlockTable(start=np.concatenate(starts), size=np.concatenate(sizes))


def holdout_count(num_samples: int, holdout: float) -> int:
    """How many samples `data.holdout` means, a share below 1 or a count. Raises UserError where none would be left."""
    count = round(num_samples * holdout) if holdout < 1 else int(holdout)
    if count >= num_samples:
        raise UserError(f"data.holdout={holdout:g} leaves none of the {num_samples} samples to train on: lower it")
    return count


def held_out(shard_samples: list[int], block_samples: int, seed: int, holdout: float) -> NDArray[np.int64]:
    """Global indices (n,) of the samples never trained on, ascending: whole blocks drawn by the seed, the last one
    cut so that the count is exact. They depend on nothing but the arguments."""
    table = block_table(shard_samples, block_samples)
    count = holdout_count(sum(shard_samples), holdout)
    bits = rng.random_bits(seed, "holdout", torch.arange(len(table.start))).numpy()
    drawn = np.argsort(bits, kind="stable")
    blocks = drawn[: int(np.searchsorted(np.cumsum(table.size[drawn]), count)) + 1] if count else drawn[:0]
    ranges = [np.arange(table.start[block], table.start[block] + table.size[block]) for block in blocks]
    return np.sort(np.concatenate([np.zeros(0, np.int64), *ranges])[:count])


def epoch_order(
    shard_samples: list[int], block_samples: int, seed: int, epoch: int, excluded: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """The order of an epoch: (N,) global sample indices, blocks permuted, then samples inside each block.

    Args:
        excluded: indices that are left out of it, as `held_out` gives them; the others keep their order.
    """
    table = block_table(shard_samples, block_samples)
    num_samples = int(table.size.sum())
    rank_of_block = np.empty(len(table.start), np.int64)
    block_bits = rng.random_bits(seed, "block_order", torch.arange(len(table.start)), stream=epoch).numpy()
    rank_of_block[np.argsort(block_bits, kind="stable")] = np.arange(len(table.start))
    sample_bits = rng.random_bits(seed, "sample_order", torch.arange(num_samples), stream=epoch).numpy()
    # One sort instead of two: the block's rank in the high bits, 32 of the 63 random bits below; a tie keeps order.
    order = np.argsort((np.repeat(rank_of_block, table.size) << 32) | (sample_bits >> 31), kind="stable")
    if excluded is None or len(excluded) == 0:
        return order
    trained = np.ones(num_samples, bool)
    trained[excluded] = False
    return order[trained[order]]


def steps_per_epoch(global_batch_size: int, num_samples: int) -> int:
    """L = N // B; the N mod B samples left over differ from epoch to epoch.

    Raises:
        UserError: fewer samples than one global batch.
    """
    if num_samples < global_batch_size:
        raise UserError(
            f"the data set has {num_samples} samples, fewer than train.global_batch_size {global_batch_size}: "
            f"lower the batch size to {num_samples} or less, or use a larger data set"
        )
    return num_samples // global_batch_size


@dataclass(frozen=True)
class Schedule:
    """Which blocks a rank holds when: block[i] from step first[i] to step last[i] of an epoch, both included.

    Sorted by first, then block, so that blocks needed together and lying together stand together.
    """

    block: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]


def schedule(indices_PL: NDArray[np.int64], table: BlockTable, first_step: int = 0) -> Schedule:
    """What must be fetched for the samples of P positions at the steps from `first_step` on.

    Args:
        indices_PL: (P, L) global sample indices; position p takes indices_PL[p, k] at step k.

    Returns:
        Every visit of a block once: visits of several positions that overlap or follow each other are one.
    """
    blocks = table.block_of(indices_PL[:, first_step:])
    changes = np.diff(blocks, axis=1) != 0
    begins = np.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    ends = np.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    visited, first, last = blocks[begins], np.nonzero(begins)[1], np.nonzero(ends)[1]
    order = np.lexsort((first, visited))
    visited, first, last = visited[order], first[order], last[order]
    # On one line with all blocks end to end, a visit is new where it begins after all before it have ended.
    line = visited * (blocks.shape[1] + 2)
    reached = np.maximum.accumulate(line + last)
    new = np.concatenate([[True], (line + first)[1:] > reached[:-1] + 1])
    until = np.concatenate([np.nonzero(new)[0][1:], [len(new)]]) - 1
    visited, first, last = visited[new], first[new], (reached - line)[until]
    order = np.lexsort((visited, first))
    return Schedule(visited[order], first[order] + first_step, last[order] + first_step)


def replacement(block: int, attempt: int, num_blocks: int, seed: int) -> int:
    """The block whose samples stand in for those of one that cannot be read; the same on every rank."""
    ordinal = torch.tensor([block])
    return int(rng.random_bits(seed, "replacement", ordinal, stream=attempt)[0]) % num_blocks


def clock(images_seen: int, global_batch_size: int, num_samples: int) -> tuple[int, int]:
    """(epoch, step in that epoch) of the batch that starts at `images_seen`, which counts B per step.

    Raises:
        UserError: a clock that no whole number of steps reaches, or fewer samples than one global batch.
    """
    step, remainder = divmod(images_seen, global_batch_size)
    if images_seen < 0 or remainder:
        raise UserError(
            f"images_seen {images_seen} is not a whole number of steps of {global_batch_size} images: "
            "continue with the train.global_batch_size the run began with"
        )
    return divmod(step, steps_per_epoch(global_batch_size, num_samples))
