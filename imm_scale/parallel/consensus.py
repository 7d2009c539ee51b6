"""What all ranks learn of each other's step without waiting for it: one small all-reduce, read a step later."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Result:
    """The sums over ranks of what they cast at one step; the same numbers on every rank.

    Attributes:
        step: the step the numbers belong to.
        stop: how many ranks want to stop.
        loss: the loss of the step, the mean over its groups.
        grad_norm: its gradient norm (rank 0's word, so that no two ranks can differ by a bit).
    """

    step: int
    stop: int
    loss: float
    grad_norm: float


class Ballot:
    """`cast` once a step on every rank. The all-reduce is started there and read at the next step, so no step waits."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pending: tuple[int, Any, torch.Tensor] | None = None

    def cast(self, step: int, stop: bool, loss: torch.Tensor, grad_norm: float) -> Result | None:
        """Starts this step's vote, and returns the one before: None at first.

        Args:
            loss: this rank's share of the loss, a scalar whose sum over ranks is the loss.
        """
        before = self.settle()
        grad_norm = grad_norm if dist.get_rank() == 0 else 0.0
        ours = torch.tensor([float(stop), 0.0, grad_norm], dtype=torch.float64, device=self._device)
        ours[1] = loss
        self._pending = (step, dist.all_reduce(ours, async_op=True), ours)
        return before

    def settle(self) -> Result | None:
        """Waits for the vote under way, if there is one; call before a commit and before leaving the process group."""
        if self._pending is None:
            return None
        step, work, sums = self._pending
        work.wait()
        self._pending = None
        stop, loss, grad_norm = sums.tolist()
        return Result(step, int(stop), loss, grad_norm)
