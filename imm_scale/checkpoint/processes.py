"""Processes of a machine, told apart for good: numbers are used again, and containers have numbers of their own."""

import os
from dataclasses import dataclass
from typing import Literal

_GONE = ("Z", "X", "x")  # a zombie runs no more; its parent has not heard of it yet


@dataclass(frozen=True)
class Process:
    """A process.

    Attributes:
        machine: the boot of the kernel and the process namespace that `number` counts in; "" where neither is told.
        number: the process id.
        started: clock ticks from boot to its start; 0 where that is not told.
    """

    machine: str
    number: int
    started: int

    def state(self) -> Literal["alive", "dead", "unknown"]:
        """Whether it lives, as far as this process can see; "unknown" for one of another machine or container."""
        if not self.machine or self.machine != _machine():
            return "unknown"
        try:
            os.kill(self.number, 0)
        except ProcessLookupError:
            return "dead"
        except PermissionError:
            pass  # another user's
        state, started = _stat(self.number)
        if not started or not self.started:
            return "unknown"
        return "dead" if state in _GONE or started != self.started else "alive"


def this() -> Process:
    """The process that asks."""
    return Process(_machine(), os.getpid(), _stat(os.getpid())[1])


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _stat(number: int) -> tuple[str, int]:
    """State and start of a process (proc(5), fields 3 and 22); ("", 0) where they cannot be read."""
    try:
        with open(f"/proc/{number}/stat") as file:
            fields = file.read().rpartition(")")[2].split()  # the name before may hold anything
        return fields[0], int(fields[19])
    except OSError:
        return "", 0
