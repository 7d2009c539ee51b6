"""Signals that ask a run to stop: noted by any rank, agreed by all, acted on at the end of a step."""

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Use as a context manager around the training loop; `agreed()` once a step on every rank.

    The handler only sets a flag. The flags are summed by an all-reduce that is started at one step and read at the
    next, so that no step waits for it and all ranks leave at the same one.
    """

    def __init__(self, device: torch.device, signals: Sequence[signal.Signals] = SIGNALS):
        self._device = device
        self._signals = signals
        self._requested = False
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Preemption":
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def agreed(self) -> bool:
        """Whether some rank had been asked to stop when this was last called; the same answer on every rank."""
        stop = False
        if self._pending is not None:
            work, votes = self._pending
            work.wait()
            stop = bool(votes.item())
        votes = torch.tensor(int(self._requested), dtype=torch.int32, device=self._device)
        self._pending = (dist.all_reduce(votes, async_op=True), votes)
        return stop

    def drain(self) -> None:
        """Waits for the last all-reduce; call before leaving the process group."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
