"""What to do about steps that are not as they should be: skipped ones, and ones that stand out.

Every decision follows from numbers that all ranks have alike, so all ranks take it.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from imm_scale.errors import RunError
from imm_scale.parallel import world
from imm_scale.parallel.consensus import StepSummary

log = logging.getLogger("imm_scale")

OVERFLOW, LOSS, GRADIENT = "overflow", "non_finite_loss", "non_finite_gradient"
_WINDOW = 128  # steps the running medians look back on
_MIN_HISTORY = 16  # steps before they are trusted


def find_cause(
    loss_G: Tensor, group_G: Tensor, gradient_is_bad: Callable[[], bool], scaled: bool, hosts: Sequence[str]
) -> tuple[str, str]:
    """Which rank and group made a step be skipped; a collective, called on every rank at skipped steps only.

    Args:
        loss_G: losses of this rank's groups, 0 in padded slots.
        group_G: their global numbers.
        gradient_is_bad: whether a gradient of this rank alone is not finite. It is a collective, and called (on every
            rank) only where all losses are finite.
        scaled: whether gradients are scaled (fp16), where an overflow is an everyday thing.

    Returns:
        OVERFLOW, LOSS or GRADIENT, and a sentence that names ranks, hosts and groups.
    """
    bad = group_G[~torch.isfinite(loss_G)].tolist()
    rows = _of_every_rank([len(bad), *bad[:1]], loss_G.device)
    with_loss = [
        f"rank {rank} ({hosts[rank]}), group {first}" + (f" (and {count - 1} more)" if count > 1 else "")
        for rank, (count, first) in enumerate(rows)
        if count
    ]
    if with_loss:
        return LOSS, f"the loss is not finite on {'; '.join(with_loss)}"
    verdicts = _of_every_rank([int(gradient_is_bad())], loss_G.device)
    with_gradient = [f"rank {rank} ({hosts[rank]})" for rank, (is_bad, _) in enumerate(verdicts) if is_bad]
    where = f"on {', '.join(with_gradient)}" if with_gradient else "(on no rank when its passes were run again)"
    if scaled:
        return OVERFLOW, f"the scaled gradient overflowed {where}"
    return GRADIENT, f"the gradient is not finite {where}, though every loss is"


def _of_every_rank(mine: Sequence[int], device: torch.device) -> list[list[int]]:
    """Up to two numbers of each rank, rank by rank; a collective."""
    rows = torch.zeros(dist.get_world_size(), 2, dtype=torch.int64, device=device)
    rows[dist.get_rank(), : len(mine)] = torch.tensor(mine, device=device)
    return world.all_sum(rows).tolist()


class Skips:
    """Counts skipped steps by cause, and ends a run that only skips.

    Raises:
        RunError: from `add`, once `most` steps in a row were skipped.
    """

    def __init__(self, most: int, counts: Mapping[str, int]):
        self._most, self._in_a_row = most, 0
        self.counts = {cause: counts.get(cause, 0) for cause in (OVERFLOW, LOSS, GRADIENT)}

    def good(self) -> None:
        """A step that was taken."""
        self._in_a_row = 0

    def add(self, step: int, cause: str, sentence: str) -> None:
        self.counts[cause] += 1
        self._in_a_row += 1
        log.warning("step %d is skipped (%d in a row): %s", step, self._in_a_row, sentence)
        if self._in_a_row >= self._most:
            raise RunError(
                f"{self._in_a_row} steps in a row were skipped (train.max_consecutive_skips), the last at step {step}: "
                f"{sentence}. Lower optimizer.lr, set train.grad_clip, or go back to an earlier checkpoint by removing "
                "the newest ones"
            )


class SpikeGuard:
    """Compares each step's loss and gradient norm with their running medians.

    Args:
        factor: how far above the median is a spike; None never looks, but keeps the history.
        history: as `state` returned it, from the checkpoint that is gone on from.
    """

    def __init__(self, factor: float | None, history: Mapping[str, Sequence[float]]):
        self._factor = factor
        self._recent = {
            name: deque(map(float, history.get(name, ())), maxlen=_WINDOW) for name in ("loss", "grad_norm")
        }

    def judge(self, summary: StepSummary) -> str | None:
        """The reason why this step is a spike, or None; only what is none enters the medians."""
        values = {"loss": summary.loss, "grad_norm": summary.grad_norm}
        if self._factor is None or not all(map(math.isfinite, values.values())):
            return None
        for name, value in values.items():
            recent = self._recent[name]
            median = statistics.median(recent) if len(recent) >= _MIN_HISTORY else math.inf
            if value > self._factor * median > 0:
                return f"the {name} {value:.4g} is {value / median:.3g} times its running median {median:.4g}"
        for name, value in values.items():
            self._recent[name].append(value)
        return None

    def state(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self._recent.items()}


class Rewind(Exception):  # noqa: N818 - not an error: it unwinds the loop to whoever builds the trainer anew
    """Asks for the last checkpoint again, stepping over the batch that begins at `images_seen`."""

    def __init__(self, step: int, images_seen: int, reason: str):
        super().__init__(reason)
        self.step, self.images_seen = step, images_seen


class Rewinds:
    """The ranges of images_seen to step over since this process began, and a bound on going back in vain.

    Args:
        most: rewinds to one and the same checkpoint after which a run ends.
    """

    def __init__(self, most: int):
        self._most = most
        self._checkpoint, self._in_vain = -1, 0
        self.ranges: list[tuple[int, int]] = []

    def add(self, rewind: Rewind, checkpoint_step: int, global_batch_size: int) -> None:
        """Notes one, to be called when the checkpoint it goes back to is known.

        Raises:
            RunError: too many without a newer checkpoint in between.
        """
        self._in_vain = self._in_vain + 1 if checkpoint_step == self._checkpoint else 1
        self._checkpoint = checkpoint_step
        if self._in_vain > self._most:
            raise RunError(
                f"step {rewind.step} spikes: {rewind}; {self._most} rewinds to step {checkpoint_step} did not help "
                "(train.max_rewinds). Lower optimizer.lr, set train.grad_clip, or raise train.spike_factor"
            )
        self.ranges.append((rewind.images_seen, rewind.images_seen + global_batch_size))
        log.warning(
            "step %d spikes: %s. Going back to step %d and stepping over images %d to %d (rewind %d of %d)",
            rewind.step, rewind, checkpoint_step, *self.ranges[-1], self._in_vain, self._most,
        )  # fmt: skip


def union(first: Iterable[tuple[int, int]], second: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Both sets of half-open ranges as one: sorted, neighbours joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted([*first, *second]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def is_stepped_over(ranges: Iterable[tuple[int, int]], images_seen: int) -> bool:
    """Whether the batch that begins there is stepped over on purpose."""
    return any(start <= images_seen < stop for start, stop in ranges)
