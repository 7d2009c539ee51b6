"""Writing checkpoints while a run goes on.

A thread copies this rank's slices to host memory while the next forward and backward passes run, which only read
them; the optimizer step after those waits for the copy, should it not be there yet. The thread then writes it (for a
remote run folder by way of a local file), asks the threads of the other ranks over a process group of their own whether
all of it worked, and lets rank 0 commit. At most one save is under way.
"""

import copy
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from imm_scale import config as configs
from imm_scale import storage
from imm_scale.checkpoint import format as checkpoints
from imm_scale.checkpoint import run_folder
from imm_scale.checkpoint.format import Meta
from imm_scale.checkpoint.host_copy import HostCopy
from imm_scale.checkpoint.run_lock import LostLockError, RunLock
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.parallel import world as distributed
from imm_scale.parallel.deepspeed_engine import Engine
from imm_scale.parallel.param_slice import ParamSlice
from imm_scale.parallel.world import World
from imm_scale.preflight import PreparedRun

Ranges = Sequence[tuple[int, int]]

_HOST = torch.device("cpu")
SLOWEST_UPLOAD = timedelta(hours=2)  # that the threads of the other ranks wait for
_LAST_WORDS_SECONDS = 60.0  # that a failing run waits for a save under way

log = logging.getLogger("imm_scale")


@dataclass
class SaveTally:
    """What a run's saves have come to; it outlives a rewind, as the saver does not.

    Attributes:
        failed: saves that did not end in a commit; the same on every rank once they are over.
        longest_seconds: the most a save has taken, from its beginning to its commit.
    """

    failed: int = 0
    longest_seconds: float = 0.0


class Saver:
    """Saves the state of a run; all ranks call it at the same steps.

    A save that fails is said, counted and left behind: training goes on, and the checkpoint before stays as it is.
    As a context manager it waits for the save under way.

    Args:
        slices: what this rank saves, live.
        tally: of the saves before these, to be counted on; None: there were none.
        lock: of the run folder, asked before anything is removed, written or committed; None: nobody else is there.

    Raises:
        UserError: on every rank, where one has no memory for the copy.
    """

    def __init__(
        self,
        prepared: PreparedRun,
        world: World,
        engine: Engine,
        slices: Sequence[ParamSlice],
        tally: SaveTally | None = None,
        lock: RunLock | None = None,
    ):
        self._prepared, self._world, self._engine, self._lock = prepared, world, engine, lock
        self._tally = tally or SaveTally()
        # Made once: writing YAML and asking for versions takes longer than the copy of a small state.
        self._fixed_meta = (configs.to_yaml(prepared.config), prepared.spec.to_json(), run_folder.versions())
        self._copy = HostCopy(slices)
        engine.before_update = self._copy.taken.wait
        self._staging = staging_folder(prepared.config, world.rank)
        self._group = distributed.group_beside(SLOWEST_UPLOAD) if world.size > 1 else None
        self._under_way: Future[str] | None = None
        self._last_problem = ""
        self._allocate()

    def _allocate(self) -> None:
        """Makes the memory of the copy at start, when failing costs nothing and all ranks can agree on what to do."""
        if self._copy.from_gpu:
            problem = self._everywhere(self._copy.allocate(pinned=True))
            if not problem:
                return
            self._copy.release()  # all ranks do alike, for the slowest sets the pace
            if self._world.is_main:
                log.warning("checkpoints are copied to pageable memory, slower, for none can be pinned: %s", problem)
        problem = self._everywhere(self._copy.allocate(pinned=False))
        if problem:
            raise UserError(
                f"no host memory for the copy a checkpoint is written from: {problem}; "
                "ask for more memory per node, fewer ranks on it, or more nodes"
            )

    @property
    def failed_checkpoints(self) -> int:
        return self._tally.failed

    @property
    def longest_seconds(self) -> float:
        return self._tally.longest_seconds

    def save(
        self,
        step: int,
        images_seen: int,
        skipped: Ranges,
        committed: Callable[[int], None],
        guards: Mapping[str, Any] | None = None,
    ) -> None:
        """Leaves the state as it is now to a thread to write. Waits for the save before, if need be.

        Args:
            skipped: ranges [first, last) of images_seen that were stepped over on purpose.
            committed: told the step on rank 0 once it is committed, on the writing thread.
            guards: what to give back as `Meta.guards`, plain enough for JSON; taken as it is now.
        """
        self.wait()
        self._copy.begin()
        meta, outcome = self._meta(step, images_seen, skipped, guards or {}), Future[str]()
        # Not a pool's thread: those are waited for at exit, and a peer that died would make this one wait for long.
        threading.Thread(target=self._run, args=(outcome, meta, committed), name="saver", daemon=True).start()
        self._under_way = outcome

    def wait(self) -> None:
        """Until no save is under way. Raises RuntimeError where its ranks could not reach each other."""
        if self._under_way is not None:
            outcome, self._under_way = self._under_way, None
            self._last_problem = outcome.result()

    def finish(self) -> None:
        """Waits until what is being saved is committed.

        Raises:
            UserError: the last save failed: what was learned since the one before would be lost.
            LostLockError: it failed because another start has the folder.
        """
        self.wait()
        if self._last_problem:
            self._still_ours()
            raise UserError(f"{self._last_problem}; the last committed checkpoint is intact: make room and start again")

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        elif self._under_way is not None:
            try:
                self._under_way.result(timeout=_LAST_WORDS_SECONDS)
            except (TimeoutError, RuntimeError) as second:
                log.error("the checkpoint under way was left: %s", second or "it took too long")

    # --- on the writing thread ---

    def _run(self, outcome: Future[str], meta: Meta, committed: Callable[[int], None]) -> None:
        began = time.monotonic()
        try:
            problem = self._write(meta, committed)
            self._tally.longest_seconds = max(self._tally.longest_seconds, time.monotonic() - began)
            outcome.set_result(problem)
        except BaseException as error:  # noqa: BLE001 - it is raised where the outcome is asked for
            outcome.set_exception(error)

    def _write(self, meta: Meta, committed: Callable[[int], None]) -> str:
        """Copies, writes and commits. Returns what went wrong, the same on every rank, or ""."""
        url, rank = checkpoints.folder(self._prepared.config.run_dir, meta.step), self._world.rank
        copied: list[ParamSlice[tuple[Tensor, ...]]] = []
        stages: Sequence[Callable[[], None]] = (
            lambda: copied.extend(self._copy.take()),
            # A damaged checkpoint that the run went back behind may still be there.
            lambda: self._discard(url) if rank == 0 else None,
            lambda: checkpoints.write_rank(url, rank, copied, self._staging),
            lambda: self._commit(url, meta) if rank == 0 else None,
        )
        problem = self._in_step(stages)
        if problem:
            self._tally.failed += 1
            problem = f"cannot write checkpoint {storage.shown(url)}: {problem}"
            log.warning("%s; training goes on, the checkpoint before is intact", problem)
        if rank == 0:
            left = _attempt(lambda: self._discard(url) if problem else self._tidy(meta, committed))
            if left:
                log.warning("after the save of step %d: %s", meta.step, left)
        return problem

    def _still_ours(self) -> None:
        """Raises LostLockError where another start has the folder."""
        if self._lock is not None:
            self._lock.verify()

    def _discard(self, url: str) -> None:
        self._still_ours()
        checkpoints.remove(url)

    def _commit(self, url: str, meta: Meta) -> None:
        self._still_ours()
        checkpoints.commit(url, meta)

    def _in_step(self, stages: Iterable[Callable[[], None]]) -> str:
        """Does one after the other on all ranks, each once the one before has worked on all; what kept one from it."""
        for stage in stages:
            problem = self._everywhere(_attempt(stage))
            if problem:
                return problem
        return ""

    def _everywhere(self, problem: str) -> str:
        return distributed.problems(problem, _HOST, self._group)

    def _tidy(self, meta: Meta, committed: Callable[[int], None]) -> None:
        config = self._prepared.config
        committed(meta.step)
        checkpoints.prune(config.run_dir, meta.step, config.train.keep_last, config.train.keep_every)
        run_folder.write_progress(config.run_dir, step=meta.step, images_seen=meta.images_seen)

    def _meta(self, step: int, images_seen: int, skipped: Ranges, guards: Mapping[str, Any]) -> Meta:
        loss_scale, (config, spec, versions) = self._engine.loss_scale, self._fixed_meta
        return Meta(
            step=step,
            images_seen=images_seen,
            optimizer_steps=self._engine.optimizer_steps(),
            config=config,
            spec=spec,
            manifest_hash=self._prepared.manifest.hash,
            world_size=self._world.size,
            zero_stage=self._prepared.config.zero.stage,
            versions=versions,
            loss_scale=None if loss_scale is None else loss_scale.value,
            loss_scale_good_steps=0 if loss_scale is None else loss_scale.good_steps,
            skipped=tuple(skipped),
            guards=copy.deepcopy(dict(guards)),
        )


def _attempt(action: Callable[[], None]) -> str:
    """Does a rank's part of a save; what kept it from working, or "".

    Whatever that is, the other ranks are told in the vote they wait in. A bug or a failing GPU has its traceback in the
    log besides; the step under way meets a failing GPU too.
    """
    try:
        return distributed.error_of(action)
    except LostLockError as error:
        return str(error)
    except Exception as error:
        log.exception("a save did not expect this")
        return f"{type(error).__name__}: {error}"


def staging_folder(config: Config, rank: int) -> str:
    """Where this rank's files wait for their upload: a local folder of this run, this rank and this user alone."""
    base = config.train.staging_dir or os.path.join(tempfile.gettempdir(), f"imm-scale-{os.getuid()}")
    run = hashlib.sha256(config.run_dir.encode()).hexdigest()[:16]
    return os.path.join(base, run, f"rank-{rank:05d}")


def remove_leftovers(config: Config, world: World) -> None:
    """Removes what a writer that died has left: every rank its staged files, rank 0 folders without a commit.

    Call it when no rank reads or writes checkpoints.
    """
    storage.remove(staging_folder(config, world.rank))
    if world.is_main:
        for step in checkpoints.uncommitted_steps(config.run_dir):
            log.info("the checkpoint of step %d is removed: its writer ended before it was committed", step)
            checkpoints.remove(checkpoints.folder(config.run_dir, step))
