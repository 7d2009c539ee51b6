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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from imm_scale import config as configs
from imm_scale import storage
from imm_scale.checkpoint import format as checkpoints
from imm_scale.checkpoint import run_folder
from imm_scale.checkpoint.format import Meta, Piece
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.parallel import world as distributed
from imm_scale.parallel.deepspeed_engine import Engine
from imm_scale.parallel.ema import ShardedEma
from imm_scale.parallel.world import World
from imm_scale.preflight import Plan

Ranges = Sequence[tuple[int, int]]

_HOST = torch.device("cpu")
SLOWEST_UPLOAD = timedelta(hours=2)  # that the threads of the other ranks wait for
_LAST_WORDS_SECONDS = 60.0  # that a failing run waits for a save under way

log = logging.getLogger("imm_scale")


class HostCopy:
    """Host memory for one copy of all slices, made at the first save and filled anew by each.

    `begin` on the training thread, `take` on any other; nothing may write to the slices in between and until `taken`.
    """

    def __init__(self) -> None:
        self._flat = torch.empty(0)
        self._stream: torch.cuda.Stream | None = None
        self._ready: torch.cuda.Event | None = None
        self.taken = threading.Event()
        self.taken.set()

    def begin(self) -> None:
        """Marks the point in the training stream from which the slices may be copied. Called on the training thread."""
        self.taken.clear()
        if torch.cuda.is_available():
            self._stream = self._stream or torch.cuda.Stream()
            self._ready = torch.cuda.current_stream().record_event()

    def take(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same pieces with the values of `begin`, safe from further steps until the next `begin`."""
        try:
            return self._take(pieces)
        finally:
            self.taken.set()

    def _take(self, pieces: Sequence[Piece]) -> list[Piece]:
        sources = [tensor.detach() for piece in pieces for tensor in piece.states.values()]
        sizes = [tensor.numel() for tensor in sources]
        if self._flat.numel() != sum(sizes):
            self._flat = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=self._stream is not None)
        views = list(self._flat.split(sizes))
        with torch.cuda.stream(self._stream):  # of None: nothing at all
            if self._stream is not None and self._ready is not None:
                self._stream.wait_event(self._ready)
            for view, source in zip(views, sources, strict=True):
                view.copy_(source, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        copies = iter(views)
        return [Piece(p.name, p.shape, p.offset, {state: next(copies) for state in p.states}) for p in pieces]


class Saver:
    """Saves the state of a run; all ranks call it at the same steps.

    A save that fails is said, counted and left behind: training goes on, and the checkpoint before stays as it is.
    As a context manager it waits for the save under way.

    Attributes:
        failed_checkpoints: saves so far that did not end in a commit; the same on every rank once they are over.
        longest_seconds: the most a save has taken so far, from its beginning to its commit.
    """

    def __init__(self, plan: Plan, world: World, engine: Engine, ema: ShardedEma):
        self._plan, self._world, self._engine, self._ema = plan, world, engine, ema
        self.failed_checkpoints = 0
        self.longest_seconds = 0.0
        # Made once: writing YAML and asking for versions takes longer than the copy of a small state.
        self._words = (configs.to_yaml(plan.config), plan.spec.to_json(), run_folder.versions())
        self._copy = HostCopy()
        engine.before_update = self._copy.taken.wait
        self._staging = staging_folder(plan.config, world.rank)
        self._group = (
            dist.new_group(backend="gloo", timeout=SLOWEST_UPLOAD, group_desc=distributed.SAVER_GROUP)
            if world.size > 1
            else None
        )
        self._under_way: Future[str] | None = None
        self._last_problem = ""

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
        pieces = self._pieces()
        meta, outcome = self._meta(step, images_seen, skipped, guards or {}), Future[str]()
        self._under_way = outcome
        # Not a pool's thread: those are waited for at exit, and a peer that died would make this one wait for long.
        threading.Thread(target=self._run, args=(outcome, pieces, meta, committed), name="saver", daemon=True).start()

    def wait(self) -> None:
        """Until no save is under way. Raises what the writing thread did not expect."""
        if self._under_way is not None:
            outcome, self._under_way = self._under_way, None
            self._last_problem = outcome.result()

    def finish(self) -> None:
        """Waits until what is being saved is committed.

        Raises:
            UserError: the last save failed: what was learned since the one before would be lost.
        """
        self.wait()
        if self._last_problem:
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

    def _run(self, outcome: Future[str], pieces: Sequence[Piece], meta: Meta, committed: Callable[[int], None]) -> None:
        began = time.monotonic()
        try:
            problem = self._write(self._copy.take(pieces), meta, committed)
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
            outcome.set_result(problem)
        except BaseException as error:  # noqa: BLE001 - it is raised where the outcome is asked for
            outcome.set_exception(error)

    def _write(self, pieces: Sequence[Piece], meta: Meta, committed: Callable[[int], None]) -> str:
        """Writes and commits. Returns what went wrong, the same on every rank, or ""."""
        url, rank = checkpoints.folder(self._plan.config.run_dir, meta.step), self._world.rank
        # A damaged checkpoint that the run went back behind may still be there.
        problem = self._everywhere(distributed.attempt(lambda: checkpoints.remove(url)) if rank == 0 else "")
        if not problem:
            part = distributed.attempt(lambda: checkpoints.write_rank(url, rank, pieces, self._staging))
            problem = self._everywhere(part)
        if not problem:
            problem = self._everywhere(distributed.attempt(lambda: checkpoints.commit(url, meta)) if rank == 0 else "")
        if problem:
            self.failed_checkpoints += 1
            problem = f"cannot write checkpoint {storage.shown(url)}: {problem}"
            log.warning("%s; training goes on, the checkpoint before is intact", problem)
        if rank == 0:
            left = distributed.attempt(lambda: checkpoints.remove(url) if problem else self._tidy(meta, committed))
            if left:
                log.warning("after the save of step %d: %s", meta.step, left)
        return problem

    def _everywhere(self, problem: str) -> str:
        return distributed.problems(problem, _HOST, self._group)

    def _tidy(self, meta: Meta, committed: Callable[[int], None]) -> None:
        config = self._plan.config
        committed(meta.step)
        checkpoints.prune(config.run_dir, meta.step, config.train.keep_last, config.train.keep_every)
        run_folder.write_status(config.run_dir, "running", step=meta.step, images_seen=meta.images_seen)

    # --- what is saved ---

    def _pieces(self) -> list[Piece]:
        return [
            Piece(shard.name, shard.shape, shard.offset, {**shard.states, **self._ema.states(index)})
            for index, shard in enumerate(self._ema.shards)
        ]

    def _meta(self, step: int, images_seen: int, skipped: Ranges, guards: Mapping[str, Any]) -> Meta:
        loss_scale, (config, spec, versions) = self._engine.loss_scale, self._words
        return Meta(
            step=step,
            images_seen=images_seen,
            optimizer_steps=self._engine.optimizer_steps(),
            config=config,
            spec=spec,
            manifest_hash=self._plan.manifest.hash,
            world_size=self._world.size,
            zero_stage=self._plan.config.zero.stage,
            versions=versions,
            loss_scale=None if loss_scale is None else loss_scale.value,
            loss_scale_good_steps=0 if loss_scale is None else loss_scale.good_steps,
            skipped=tuple(skipped),
            guards=copy.deepcopy(dict(guards)),
        )


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
