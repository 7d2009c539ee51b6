"""Who has the lock of a run folder, and whether it still lives.

Processes of a machine are told apart for good: numbers are used again, and containers have numbers of their own.
"""

import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from imm_scale import storage
from imm_scale.parallel import world as distributed

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


def this_process() -> Process:
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


@dataclass(frozen=True)
class Owner:
    """Who has the lock.

    Attributes:
        token: of this start alone.
        process: who it is on which machine, so that a process of the same machine can be looked up.
        host: name of the node, for people.
        job, restart: SLURM's job id and how often it was put back; None and 0 elsewhere.
        place: the folder itself, so that a copy of a run folder is not taken for the one its owner trains in.
        since: when it took the lock, in its own clock; for people.
        beat: how many heartbeats it has written.
        released: whether it has left.
    """

    token: str
    process: Process
    host: str
    job: str | None
    restart: int
    place: str
    since: str
    beat: int = 0
    released: bool = False

    @classmethod
    def here(cls, run_dir: str, env: Mapping[str, str] = os.environ) -> "Owner":
        """This process."""
        return cls(
            uuid.uuid4().hex,
            this_process(),
            distributed.hostname(),
            env.get("SLURM_JOB_ID"),
            int(env.get("SLURM_RESTART_COUNT", 0)),
            _place(run_dir),
            time.strftime("%Y-%m-%d %H:%M:%S %z"),
        )

    def to_json(self) -> bytes:
        """The content of its file."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Owner":
        """Reads a file. One that says nothing, after a crash of the disk, is of an owner nobody knows."""
        try:
            fields = json.loads(data)
            return cls(**{**fields, "process": Process(**fields["process"])})
        except (ValueError, TypeError, KeyError):
            return cls("", Process("", 0, 0), "an unknown host", None, 0, "", "an unknown time")

    def has_ended(self, asking: "Owner") -> bool:
        """Whether it is known to be gone, without waiting."""
        requeued = self.job is not None and self.job == asking.job and self.restart < asking.restart
        return self.released or requeued or self.process.state() == "dead"

    def is_alive(self, asking: "Owner") -> bool:
        """Whether it is known to be there and to mean this folder, without waiting."""
        return self.place == asking.place and self.process.state() == "alive"

    def __str__(self) -> str:
        job = f" (SLURM job {self.job})" if self.job is not None else ""
        return f"process {self.process.number} on {self.host}{job}, since {self.since}"


def _place(run_dir: str) -> str:
    """What tells the folder from a copy of it, as this machine sees it."""
    if not storage.is_local(run_dir):
        return run_dir
    os.makedirs(storage.local_path(run_dir), exist_ok=True)
    folder = os.stat(storage.local_path(run_dir))
    return f"{folder.st_dev}:{folder.st_ino}"
