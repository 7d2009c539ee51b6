"""A thread per rank that notices a step that does not end, finds out which rank is to blame, and ends the job.

Nothing is exchanged while all is well. A rank past its deadline writes what it is doing into RUN/watchdog/ (a roll
call), waits for the others to do so too, and reads: a rank that does not answer is stopped, dead or cut off; if all
answer, the one that has started the fewest collectives is the one the others wait for.
"""

import contextlib
import faulthandler
import json
import logging
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from imm_scale import devices, storage
from imm_scale.checkpoint import run_folder
from imm_scale.checkpoint.run_lock import RunLock
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World

log = logging.getLogger("imm_scale")

START_SECONDS = 1800.0  # for the first step, which compiles and opens data
_FLOOR, _TIMES_MEDIAN = 600.0, 20.0  # above the storage's own patience with a server that restarts
_FOLDER = "watchdog"


@dataclass(frozen=True)
class Answer:
    """What one rank was doing when its step went past the deadline.

    Attributes:
        collectives: how many collectives it has started; -1 where torch does not tell.
        last: the last of them, in words.
    """

    rank: int
    host: str
    step: int
    phase: str
    seconds: float
    collectives: int
    last: str

    def __str__(self) -> str:
        return (
            f"rank {self.rank} ({self.host}) has been in step {self.step}, {self.phase}, for {self.seconds:.0f} s; "
            f"last collective: {self.last}"
        )


def last_collective() -> tuple[int, str]:
    """(number of collectives this rank's training has started, the last one in words), by torch's flight recorder."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None) if torch.cuda.is_available() else None
    dump = dump or getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    entries = json.loads(dump(True, False)).get("entries", []) if dump is not None else []
    # The thread that writes checkpoints talks to its peers too, whenever it likes.
    entries = [entry for entry in entries if entry["process_group"][1] != distributed.SAVER_GROUP]
    if not entries:
        return -1, "unknown"
    last = max(entries, key=lambda entry: entry["record_id"])
    started: dict[str, int] = {}
    for entry in entries:
        group = entry["process_group"][0]
        started[group] = max(started.get(group, 0), entry["collective_seq_id"])
    number = sum(started.values())
    return number, f"{last['profiling_name']} of sizes {last['input_sizes']}, number {number}"


def blame(answers: Sequence[Answer], hosts: Sequence[str]) -> str:
    """One sentence that names rank and host of whoever keeps the others waiting."""
    missing = sorted(set(range(len(hosts))) - {answer.rank for answer in answers})
    if missing:
        names = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in missing[:8])
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        return f"{names}{more} hangs: it does not answer, so it is stopped, dead, or its node is cut off"
    if len(hosts) == 1:
        return f"{answers[0]}; it hangs there"
    behind = min(answer.collectives for answer in answers)
    late = [answer for answer in answers if answer.collectives == behind]
    if len(late) < len(answers):
        return f"{late[0]}; it hangs there while the others wait for it in a later collective"
    return f"all ranks wait in the same collective, so the network hangs: {late[0]}"


class Watchdog:
    """Use as a context manager around the training loop; `beat` at each phase of a step, `step_done` at its end.

    Args:
        timeout: seconds a step may take; None: 20 times the median step, at least 600 and at most what the first may.
        hosts: host name of each rank.
        call: an id all ranks of this start share, so that an earlier start's answers are not read.
        lock: of the run folder, asked before anything is said there; None: nobody else can be there.

    Attributes:
        limit: seconds the step under way may take.
        fired: the deadline has passed, and the process is about to end.
    """

    def __init__(
        self,
        run_dir: str,
        world: World,
        timeout: float | None,
        hosts: Sequence[str],
        call: str,
        lock: RunLock | None = None,
    ):
        self._lock = lock
        self._run_dir, self._world, self._hosts, self._timeout = run_dir, world, hosts, timeout
        self._folder = storage.join(run_dir, _FOLDER, call)
        self._durations: deque[float] = deque(maxlen=101)
        self.limit = START_SECONDS
        self._step, self._phase = 0, "starting"
        self._since = time.monotonic()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.fired = False

    def __enter__(self) -> "Watchdog":
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.hold_if_fired()
        self._left.set()
        self._thread.join()

    def hold_if_fired(self) -> None:
        """Stays here until the process is ended, where the watchdog is about to: its words are better than a peer's
        closed connection."""
        if self.fired:
            self._thread.join()

    def beat(self, step: int, phase: str) -> None:
        """The main thread begins another phase of a step."""
        self._step, self._phase = step, phase

    def step_done(self, slow: bool = False) -> None:
        """A step has ended, and the next one's time runs.

        Args:
            slow: it wrote a checkpoint or the like, so it says nothing about the others.
        """
        now = time.monotonic()
        if not slow:
            self._durations.append(now - self._since)
        self._since, self.limit = now, self._step_limit()

    def allow(self, seconds: float) -> None:
        """The step under way may take at least so long, because of what it does besides."""
        self.limit = max(self.limit, seconds)

    def _step_limit(self) -> float:
        if self._timeout is not None:
            return self._timeout
        if not self._durations:
            return START_SECONDS
        return max(_FLOOR, min(_TIMES_MEDIAN * statistics.median(self._durations), START_SECONDS))

    def _watch(self) -> None:
        devices.use_device(distributed.device(self._world))  # for torch's flight recorder
        while not self._left.wait(min(1.0, self.limit / 10)):
            if time.monotonic() - self._since > self.limit:
                self.fired = True
                self._end_the_job()

    def _end_the_job(self) -> None:
        try:
            self._find_who_hangs()
        except Exception:
            log.exception("the watchdog could not find out which rank hangs")
        finally:  # whatever went wrong, the scheduler must be able to act
            logging.shutdown()
            os._exit(1)

    def _find_who_hangs(self) -> None:
        limit, world = self.limit, self._world
        seconds = time.monotonic() - self._since
        host = self._hosts[world.rank]
        answer = Answer(world.rank, host, self._step, self._phase, seconds, *last_collective())
        log.error("step %d is past its deadline of %.0f s: %s", self._step, limit, answer)
        self._dump_stacks()
        answers = self._roll_call(answer, patience=min(30.0, max(2.0, limit / 4)))
        reason = blame(answers, self._hosts)
        log.error("%s", reason)
        if min(one.rank for one in answers) == world.rank:
            if self._lock is not None:
                self._lock.verify()
            run_folder.write_failure(self._run_dir, reason, step=self._step, rank=world.rank)
        else:
            time.sleep(2.0)  # launchers kill all at the first exit: let the status be written

    def _dump_stacks(self) -> None:
        """Where every Python thread of this process is, in this rank's log file."""
        names = [handler.baseFilename for handler in log.handlers if isinstance(handler, logging.FileHandler)]
        with open(names[0], "a") if names else contextlib.nullcontext(sys.stderr) as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def _roll_call(self, answer: Answer, patience: float) -> list[Answer]:
        """What every rank that can still write says, after having waited so many seconds for it."""
        storage.make_folder(self._folder)
        storage.write_text(storage.join(self._folder, f"rank-{answer.rank:05d}.json"), json.dumps(asdict(answer)))
        deadline = time.monotonic() + patience
        names: list[str] = []
        while len(names) < self._world.size and time.monotonic() < deadline:
            time.sleep(0.2)
            names = [name for name in storage.list_names(self._folder) if name.endswith(".json")]
        return [Answer(**json.loads(storage.read_text(storage.join(self._folder, name)))) for name in names]


def collective_patience(timeout: float | None) -> float:
    """Seconds after which torch gives up a collective: twice what a step may take, for the watchdog says who hangs."""
    return 2.0 * max(START_SECONDS, timeout or 0.0)


def hosts_and_call(world: World) -> tuple[list[str], str]:
    """(host name of each rank, an id all ranks share); a collective, once at start."""
    mine = (distributed.hostname(), f"{time.time():.0f}-{os.getpid()}")
    everyone = distributed.gather_objects(mine, world)
    return [host for host, _ in everyone], everyone[0][1]
