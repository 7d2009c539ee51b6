"""What all ranks learn of each other's step without waiting for it: one small all-reduce, read a step later."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class StepSummary:
    """The sums over ranks of what they submitted at one step; the same numbers on every rank.

    Attributes:
        step: the step the numbers belong to.
        stop: how many ranks want to stop.
        loss: the loss of the step, the mean over its groups.
        grad_norm: its gradient norm (rank 0's word, so that no two ranks can differ by a bit).
        lost: how many ranks know that the run folder is another start's.
    """

    step: int
    stop: int
    loss: float
    grad_norm: float
    lost: int = 0


@dataclass(frozen=True)
class _Pending:
    """An all-reduce under way.

    Attributes:
        done: its sums are in host memory once `done.synchronize()` (on a GPU) or `done.wait()` (on CPU) returns.
        loss: kept alive until then, for the allocator does not know that another stream reads it.
    """

    step: int
    done: Any
    loss: Tensor


class StepConsensus:
    """`submit` once a step on every rank. The all-reduce is started there and read at the next step, so no step waits.

    On a GPU the exchange has a stream of its own, from pinned host memory to the device, over the ranks and back. The
    passes never queue behind it, and the host waits for an event that lies a whole step back instead of for the stream.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._host = torch.zeros(4, dtype=torch.float64, pin_memory=self._on_gpu)
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._pending: _Pending | None = None

    def submit(self, step: int, stop: bool, loss: Tensor, grad_norm: float, lost: bool = False) -> StepSummary | None:
        """Starts this step's exchange, and returns the summary of the one before: None at first.

        Args:
            loss: this rank's share of the loss, a scalar whose sum over ranks is the loss.
        """
        before = self.settle()
        self._host[0] = float(stop)
        self._host[2] = grad_norm if dist.get_rank() == 0 else 0.0
        self._host[3] = float(lost)
        with self._beside_the_passes():
            self._sums.copy_(self._host, non_blocking=True)
            self._sums[1].copy_(loss)
            work = dist.all_reduce(self._sums, async_op=True)
            done = self._copy_back(work) if self._on_gpu else work
        self._pending = _Pending(step, done, loss)
        return before

    def settle(self) -> StepSummary | None:
        """Waits for the exchange under way, if there is one; call before a commit and before leaving the process group.

        Returns:
            Its summary, or None where none is under way.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        if self._on_gpu:
            pending.done.synchronize()
        else:
            pending.done.wait()
            self._host.copy_(self._sums)
        stop, loss, grad_norm, lost = self._host.tolist()
        return StepSummary(pending.step, int(stop), loss, grad_norm, int(lost))

    def _beside_the_passes(self) -> AbstractContextManager[Any]:
        """The exchange's own stream, which starts once what is queued so far, and with it the loss, is done."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._sums.device))
        return torch.cuda.stream(self._stream)

    def _copy_back(self, work: Any) -> Any:
        """Queues the copy of the sums to the host; the event that marks its end."""
        work.wait()  # makes this stream wait, not the host
        self._host.copy_(self._sums, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return done
