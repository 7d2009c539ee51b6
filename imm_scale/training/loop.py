"""The steps of a run, from where a trainer stands to the last commit, with everything that watches over them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from imm_scale.checkpoint.async_saver import SLOWEST_UPLOAD
from imm_scale.checkpoint.run_lock import RunLock
from imm_scale.data.loader import Batch, Loader, Reading
from imm_scale.parallel.consensus import StepConsensus, StepSummary
from imm_scale.parallel.deepspeed_engine import StepResult
from imm_scale.preflight import trained_samples
from imm_scale.training import replay, step_guard
from imm_scale.training.lr_schedule import learning_rate
from imm_scale.training.optimizer_statistics import OptimizerStatistics
from imm_scale.training.profiling import Profiler
from imm_scale.training.residual_trend import ResidualTrend
from imm_scale.training.run_log import RunLog, log
from imm_scale.training.state import State
from imm_scale.training.step_guard import Rewind, Skips, SpikeGuard
from imm_scale.training.step_metrics import Meter, Utilization
from imm_scale.training.stop_signals import Deadline, StopSignals
from imm_scale.training.validation import HeldOut
from imm_scale.training.watchdog import START_SECONDS, Watchdog

Outcome = Literal["completed", "preempted"]


@dataclass(frozen=True)
class RunContext:
    """What a run is in the middle of, and what outlives a rewind.

    Attributes:
        hosts: host name of each rank.
        call: an id all ranks of this start share.
        signals: what this rank was asked.
        deadline: the end of the job.
        lock: of the run folder; None: nobody else can be there.
    """

    hosts: Sequence[str]
    call: str
    signals: StopSignals
    deadline: Deadline
    lock: RunLock | None = None


class Loop:
    """Steps a state to its last commit. Every rank has one, and calls its methods alike."""

    def __init__(self, state: State, context: RunContext):
        self.state, self.context = state, context
        self.config = config = state.prepared.config
        train, run_dir, world = config.train, config.run_dir, state.world
        self.run_log = RunLog(config, state.step, world)
        statistics = OptimizerStatistics(state.ema, config.optimizer.betas[1], config.optimizer.eps)
        utilization = Utilization(config, state.prepared.spec, state.prepared.layout, state.device)
        self.meter = Meter(state.device, train.global_batch_size, statistics, utilization)
        self.residual_trend = ResidualTrend()
        self.consensus = StepConsensus(state.device)
        self.skips = Skips(train.max_consecutive_skips, state.guards.get("skips", {}))
        self.spikes = SpikeGuard(train.spike_factor, state.guards.get("recent", {}))
        self.profiler = Profiler(run_dir, train.profile_steps, world)
        self.watchdog = Watchdog(run_dir, world, train.step_timeout, context.hosts, context.call, context.lock)
        self.held_out = _held_out(state)
        self.stopping = False
        self._holdout_loss: float | None = None

    def run(self) -> Outcome:
        """Trains until max_steps or until asked to stop; either way the last step is committed.

        Raises:
            Rewind: a step spiked; whatever was being saved is committed.
            RunError: the run cannot go on.
        """
        state = self.state
        with self.watchdog, _loader(state) as loader:
            try:
                with state.saver:
                    while state.step < self.config.train.max_steps and not self.stopping:
                        self._step(loader)
                    self.watchdog.beat(state.step, "waiting for the last checkpoint")
                    self.watchdog.allow(SLOWEST_UPLOAD.total_seconds())
            finally:
                self.profiler.finish(state.step)
        return "completed" if state.step == self.config.train.max_steps else "preempted"

    def _step(self, loader: Loader) -> None:
        state, train = self.state, self.config.train
        began, number = time.perf_counter(), state.step + 1
        self.watchdog.beat(number, "reading data")
        batch = next(loader)
        assert batch.images_seen == state.images_seen
        if step_guard.is_stepped_over(state.stepped_over, state.images_seen):
            state.advance()
            log.info("step %d: images %d and on are stepped over", number, batch.images_seen)
        else:
            self._train_on(batch, began)
        commits = self._is_due(train.checkpoint_every)
        if commits:
            # The step that is about to be saved is judged first, so that nothing bad is ever committed.
            self._act_on(self.consensus.settle())
        self.run_log.progress.advance()
        measures = self._measure_held_out()
        if commits or measures or self._is_due(train.log_every):
            self._write_record(loader)
        if commits:
            self._save()
        self.watchdog.step_done(slow=commits or measures)

    def _is_due(self, every: int) -> bool:
        """Whether to do, at the end of this step, what is done every so many steps and at the end of the run."""
        step = self.state.step
        return self.stopping or step == self.config.train.max_steps or step % every == 0

    def _train_on(self, batch: Batch, began: float) -> None:
        state, number = self.state, self.state.step + 1
        self.watchdog.beat(number, "the forward and backward pass or the optimizer step")
        self.meter.before_step(logged=number % self.config.train.log_every == 0)
        self.profiler.before_step(number)
        micro_batches = batch.micro_batches(state.prepared.layout.accumulation)
        lr = learning_rate(self.config, state.images_seen + state.prepared.layout.global_batch_size)
        result = state.engine.step(micro_batches, lr)
        if not result.skipped:
            state.update_averages()
        state.advance()
        self.profiler.after_step(number)
        self._note_skip(result, batch, micro_batches)
        seconds = time.perf_counter() - began
        self.meter.add(result, batch.weight, seconds)
        self.context.deadline.stepped(seconds)
        self.watchdog.beat(number, "the ranks' consensus")
        self.context.signals.renew()
        wants_to_stop = self.context.signals.heard is not None or self.context.deadline.is_near(
            state.saver.longest_seconds
        )
        lost = self._lost_the_folder()
        self._act_on(self.consensus.submit(number, wants_to_stop, result.loss, result.grad_norm, lost))

    def _lost_the_folder(self) -> bool:
        """Rank 0 keeps the lock, and says so for all."""
        lock = self.context.lock
        return lock is not None and self.state.world.is_main and lock.is_lost()

    def _note_skip(self, result: StepResult, batch: Batch, micro_batches: Sequence[Batch]) -> None:
        if not result.skipped:
            self.skips.good()
            return
        state, particles = self.state, self.state.prepared.layout.particles
        self.watchdog.beat(state.step, "the passes of a skipped step once more")
        loss_G = torch.where(batch.weight.to(result.groups.loss_G.device) > 0, result.groups.loss_G, 0.0)
        group_G = batch.ordinal.view(-1, particles)[:, 0].to(loss_G.device) // particles
        cause, sentence = step_guard.find_cause(
            loss_G,
            group_G,
            lambda: replay.gradient_is_bad(state.engine, micro_batches, result.loss_scale),
            self.config.precision == "fp16",
            self.context.hosts,
        )
        self.skips.add(state.step, cause, sentence)

    def _act_on(self, summary: StepSummary | None) -> None:
        """Acts on what all ranks know of a step."""
        if summary is None:
            return
        if summary.lost:
            assert self.context.lock is not None
            self.context.lock.verify()
            raise self.context.lock.lost()
        if summary.stop and not self.stopping:
            log.info("asked to stop (by %d ranks): committing step %d and leaving", summary.stop, self.state.step)
            self.stopping = True
        reason = self.spikes.judge(summary)
        if reason is not None:
            self.state.saver.wait()
            raise Rewind(summary.step, (summary.step - 1) * self.config.train.global_batch_size, reason)

    def _measure_held_out(self) -> bool:
        """Takes the held-out loss where it is due; whether it was."""
        state = self.state
        if self.held_out is None or not self._is_due(self.config.train.holdout_every):
            return False
        self.watchdog.beat(state.step, "the loss of the held-out samples")
        self.watchdog.allow(START_SECONDS)
        self._holdout_loss = self.held_out.loss(state.engine)
        return True

    def _write_record(self, loader: Loader) -> None:
        state = self.state
        if self.meter.is_empty:  # every batch since the last record was stepped over
            return
        self.watchdog.beat(state.step, "the sums of a record")
        record: dict[str, Any] = {"step": state.step, "images_seen": state.images_seen, "epoch": self._epoch()}
        record |= self.meter.record(state.engine.optimizer_steps(), loader.data_seconds, loader.counters)
        record["lr"] = learning_rate(self.config, state.images_seen)
        record["skipped_steps"] = sum(self.skips.counts.values())
        record |= {f"skipped_{cause}": count for cause, count in self.skips.counts.items()}
        record["stepped_over_images"] = sum(
            last - first for first, last in state.stepped_over if last <= state.images_seen
        )
        record["failed_checkpoints"] = state.saver.failed_checkpoints
        if self._holdout_loss is not None:
            record["holdout_loss"], self._holdout_loss = self._holdout_loss, None
        trend = self.residual_trend.warning(record)
        if trend is not None and state.world.is_main:
            log.warning(trend)
        if not self._lost_the_folder():
            self.run_log.write({**record, "time": time.time()})

    def _epoch(self) -> float:
        """How often the training samples have been seen: images seen over their number, held-out samples left out."""
        return self.state.images_seen / trained_samples(self.config, self.state.prepared.manifest)

    def _save(self) -> None:
        state = self.state
        self.watchdog.beat(state.step, "a checkpoint, or the one before it")
        self.watchdog.allow(SLOWEST_UPLOAD.total_seconds())
        state.guards = {"skips": self.skips.counts, "recent": self.spikes.state()}
        state.save(self.run_log)


def _held_out(state: State) -> HeldOut | None:
    config = state.prepared.config
    if config.data.holdout == 0 and state.prepared.held_out is None:
        return None
    dataset = state.prepared.dataset if state.prepared.held_out is None else state.prepared.held_out
    return HeldOut(config, dataset, state.prepared.spec.space, state.prepared.layout, state.world.rank, state.device)


def _loader(state: State) -> Loader:
    config = state.prepared.config
    return Loader(
        state.prepared.dataset,
        state.prepared.layout,
        state.world.rank,
        config.seed,
        config.data.block_samples,
        state.images_seen,
        config.data.flip,
        state.prepared.spec.space,
        state.device,
        Reading(config.data.cache_dir, config.data.cache_bytes, config.data.on_bad_block),
        config.data.holdout,
    )
