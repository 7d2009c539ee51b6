"""When a run has to stop: a signal, or the end of its SLURM job coming near.

Nothing here decides alone: `wanted` says what this rank has heard, and the ranks agree on it (parallel/consensus.py).
"""

import logging
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

log = logging.getLogger("imm_scale")
_STEPS = 50  # recent steps a deadline looks at


class StopSignals:
    """Notes signals that ask a run to stop. Use as a context manager around the whole run, in the main thread.

    The handler only sets a flag, so a second signal changes nothing. After a signal the handlers stay in place to the
    end of the process: a launcher that repeats itself must not kill a run that is just leaving.
    """

    def __init__(self, names: Sequence[str]):
        self._signals = [signal.Signals[name] for name in names]
        self._previous: dict[signal.Signals, Any] = {}
        self.heard: str | None = None

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.getsignal(number) for number in self._signals}
        self.renew()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if self.heard is None else signal.SIG_IGN)

    def renew(self) -> None:
        """Puts the handlers in place once more, and Python's own of SIGINT; call after each step.

        Once Triton has compiled something, LLVM has handlers of its own there: SIGUSR1 does nothing, SIGINT ends the
        process where it stands. Python still believes its own are in place.
        """
        handlers = {signal.SIGINT: signal.getsignal(signal.SIGINT)} | dict.fromkeys(self._signals, self._note)
        for number, handler in handlers.items():
            if handler is not None:  # of what is not Python's
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.heard = self.heard or signal.Signals(number).name


class Deadline:
    """Whether another two steps and a checkpoint still fit before the end of the job.

    Args:
        end: when the job ends, in seconds since the epoch; None: never.
        margin: seconds that must remain after the last commit.
    """

    def __init__(self, end: float | None, margin: float):
        self.end, self._margin = end, margin
        self._steps: deque[float] = deque(maxlen=_STEPS)

    def stepped(self, seconds: float) -> None:
        """Tells how long a step took."""
        self._steps.append(seconds)

    def is_near(self, save_seconds: float, now: float | None = None) -> bool:
        """Whether to stop. The ranks agree one step late, so two of the longest recent steps must fit.

        Args:
            save_seconds: what a checkpoint has taken so far, at most.
        """
        if self.end is None:
            return False
        needed = 2 * max(self._steps, default=0.0) + save_seconds + self._margin
        return (time.time() if now is None else now) + needed >= self.end


def job_end(env: Mapping[str, str] = os.environ) -> float | None:
    """When the SLURM job ends, in seconds since the epoch; None without a job or where it has no limit.

    SLURM_JOB_END_TIME says it where the cluster sets it (22.05 and later), squeue elsewhere.
    """
    if "SLURM_JOB_END_TIME" in env:
        return float(env["SLURM_JOB_END_TIME"])
    if "SLURM_JOB_ID" not in env:
        return None
    command = ["squeue", "--noheader", "--jobs", env["SLURM_JOB_ID"], "--format", "%L"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("squeue does not say when the job ends: %s", error)
        return None
    left = seconds_left(answer.stdout.strip())
    return None if left is None else time.time() + left


def seconds_left(text: str) -> float | None:
    """squeue's time left, `[days-][hours:]minutes:seconds`, in seconds; None where it is no time (UNLIMITED)."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or (days and not days.isdigit()):
        return None
    seconds = 0.0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return seconds + 86400 * int(days or 0)


def deadline(stop_before: float | None, env: Mapping[str, str] = os.environ) -> Deadline:
    """For `train.stop_before`; says so where there is no end to stop before."""
    if stop_before is None:
        return Deadline(None, 0.0)
    end = job_end(env)
    if end is None:
        log.warning("train.stop_before=%g does nothing: no SLURM job with a time limit is known here", stop_before)
    return Deadline(end, stop_before)
