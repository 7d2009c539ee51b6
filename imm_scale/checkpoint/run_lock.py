"""One run folder, one run: a lock that outlives its owner's death, on a disk and in an object store.

RUN/lock/NNNNNNNN.json says who trains in the folder; the file with the highest number counts. Taking the lock creates
the next number, which the store grants to one of several; from then on whoever had the number before has lost. The
owner writes its file again every HEARTBEAT_SECONDS, with another count, and a last time when it leaves.

Nobody compares the clocks of two machines. An owner is gone when it said so; when it is a process of this machine that
no longer lives; when it is an earlier start of this very SLURM job; or when its file has not changed for STALE_SECONDS
by the clock of the one who looks.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from imm_scale import storage
from imm_scale.checkpoint.lock_owner import Owner
from imm_scale.errors import RunError, UserError
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World
from imm_scale.storage.retries import is_unknown_to_store

FOLDER = "lock"
HEARTBEAT_SECONDS = 10.0
# Longer than NFS shows old attributes (60 s by default), and as long as a request to a store that restarts is retried.
STALE_SECONDS = 180.0
_POLL_SECONDS = 1.0
_UNSURE_SECONDS = 3 * HEARTBEAT_SECONDS  # after so long without a heartbeat of its own an owner asks before it writes

log = logging.getLogger("imm_scale")


class LostLockError(RunError):
    """Another start has taken the run folder, because this one gave no sign of life for too long."""


@dataclass(frozen=True)
class _LockFile:
    """The file that counts: its number (0: there is none) and content."""

    number: int
    data: bytes

    @property
    def owner(self) -> Owner:
        return Owner.from_json(self.data)


def _url(run_dir: str, number: int) -> str:
    return storage.join(run_dir, FOLDER, f"{number:08d}.json")


def _newest(run_dir: str) -> _LockFile:
    while True:
        names = storage.list_names(storage.join(run_dir, FOLDER))
        stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        numbers = [int(stem) for stem in stems if stem.isdecimal()]
        if not numbers:
            return _LockFile(0, b"")
        try:
            return _LockFile(max(numbers), storage.read_bytes(_url(run_dir, max(numbers))))
        except FileNotFoundError:
            continue  # whoever came after has tidied up


def owner_of(run_dir: str) -> Owner | None:
    """Who has the lock of a run folder, as far as its files say; None where nobody does, or it has been released."""
    newest = _newest(run_dir)
    return None if newest.number == 0 or newest.owner.released else newest.owner


def check_free(run_dir: str) -> None:
    """Raises UserError where a process of this machine trains in the folder; what other machines do is not known."""
    owner = owner_of(run_dir)
    if owner is not None and owner.is_alive(Owner.here(run_dir)):
        raise _refusal(run_dir, owner)


def take(run_dir: str, say: Callable[[str], None], pause: Callable[[float], None] = time.sleep) -> "RunLock":
    """Takes the lock of a run folder, of an owner that is gone if need be.

    Args:
        say: is told when this has to wait, and for how long at most.

    Raises:
        UserError: another start trains there.
        OSError: the folder cannot be written to.
    """
    me, seen, since = Owner.here(run_dir), None, 0.0
    while True:
        newest = _newest(run_dir)
        silent = seen == newest and time.monotonic() - since >= STALE_SECONDS
        if newest.number == 0 or silent or newest.owner.has_ended(me):
            lock = _create(run_dir, newest.number + 1, me)
            if lock is not None:
                return lock
            seen = None  # another was faster
            continue
        if newest.owner.is_alive(me) or seen not in (None, newest):
            raise _refusal(run_dir, newest.owner)
        if seen is None:
            seen, since = newest, time.monotonic()
            say(f"{run_dir} is locked by {newest.owner}: waiting up to {STALE_SECONDS:.0f} s for a sign of life")
        pause(_POLL_SECONDS)


def _refusal(run_dir: str, owner: Owner) -> UserError:
    end = f"imm-scale cancel or scancel {owner.job}" if owner.job else f"kill {owner.process.number} on {owner.host}"
    return UserError(
        f"{run_dir} is in use by {owner}, and two runs would write over each other. End that one first ({end}), or "
        "choose another run.dir or run.name"
    )


def _create(run_dir: str, number: int, me: Owner) -> "RunLock | None":
    """The lock, if nobody else was faster. What the file says afterwards counts: an answer may be lost on the way, and
    some stores overwrite where they should refuse."""
    try:
        storage.create_bytes(_url(run_dir, number), me.to_json())
    except OSError as error:
        if not is_unknown_to_store(error):
            raise
        log.warning("%s: this store has no conditional writes: of two starts at once one stops a little later", run_dir)
        storage.write_bytes(_url(run_dir, number), me.to_json())
    if storage.read_bytes(_url(run_dir, number)) != me.to_json():
        return None
    folder = storage.join(run_dir, FOLDER)
    for name in storage.list_names(folder):
        if name < storage.name(_url(run_dir, number)):
            storage.remove(storage.join(folder, name))
    return RunLock(run_dir, number, me)


class RunLock:
    """A lock as its owner has it, and as the other ranks know it.

    Args:
        number: of the file.
        me: what is in it.
    """

    def __init__(self, run_dir: str, number: int, me: Owner):
        self._run_dir, self._number, self._me = run_dir, number, me
        self._lost: Owner | None = None
        self._verified = time.monotonic()
        self._left = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[type["RunLock"], tuple[str, int, Owner]]:
        """What another rank gets: it can ask, and neither keeps nor releases the lock."""
        return RunLock, (self._run_dir, self._number, self._me)

    # --- asking ---

    def is_lost(self) -> bool:
        """Whether another start has taken the folder; asks the store only after a pause in the heartbeats."""
        if self._lost is None and time.monotonic() - self._verified > _UNSURE_SECONDS:
            self._look()
        return self._lost is not None

    def verify(self) -> None:
        """Asks the store. Raises LostLockError where another start has the folder, OSError where it does not answer."""
        self._look()
        if self._lost is not None:
            raise self.lost()

    def lost(self) -> LostLockError:
        """What to say where the lock is lost."""
        by = self._lost or "another start"
        return LostLockError(
            f"{self._run_dir} was taken over by {by}: this process gave no sign of life for more than "
            f"{STALE_SECONDS:.0f} s. It stops and writes nothing more; the other goes on from the last checkpoint"
        )

    def _look(self) -> None:
        newest = _newest(self._run_dir)
        if newest.number != self._number or newest.owner.token != self._me.token:
            self._lost = self._lost or newest.owner
        self._verified = time.monotonic()

    # --- keeping ---

    def keep(self) -> None:
        """Writes heartbeats from a thread until `release`."""
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        told = False
        while not self._left.wait(HEARTBEAT_SECONDS) and self._lost is None:
            try:
                self._renew(released=False)
                told = False
            except (OSError, UserError) as error:
                if not told:
                    log.warning("the lock of %s cannot be renewed: %s", self._run_dir, error)
                told = True

    def _renew(self, released: bool) -> None:
        with self._one_at_a_time:
            self._look()
            if self._lost is None:
                self._me = replace(self._me, beat=self._me.beat + 1, released=released)
                storage.write_bytes(_url(self._run_dir, self._number), self._me.to_json())

    def release(self) -> None:
        """Says that the folder is free; where that cannot be written, others find out by themselves."""
        self._left.set()
        if self._thread is not None:
            self._thread.join(_UNSURE_SECONDS)
        try:
            self._renew(released=True)
        except (OSError, UserError) as error:
            log.warning("the lock of %s could not be released: %s", self._run_dir, error)


@contextmanager
def held(run_dir: str, world: World, say: Callable[[str], None]) -> Iterator[RunLock]:
    """The lock of a run folder for all ranks together, kept by rank 0 until this is left, whatever the reason.

    Raises:
        UserError: on every rank, where another start trains there or the folder cannot be written to.
    """
    taken: list[RunLock] = []

    def attempt() -> None:
        try:
            taken.append(take(run_dir, say))
        except OSError as error:
            raise UserError(
                f"cannot write to run.dir={run_dir}: {error}; make it writable or choose another run.dir"
            ) from error

    problem = distributed.error_of(attempt) if world.is_main else ""
    try:
        problem = distributed.problems(problem, distributed.device(world))
        if problem:
            raise UserError(problem)
        shared = distributed.gather_objects(taken[0] if taken else None, world)[0]
        if world.is_main:
            taken[0].keep()
        yield taken[0] if world.is_main else shared
    finally:
        for lock in taken:
            lock.release()
