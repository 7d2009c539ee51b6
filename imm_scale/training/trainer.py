"""A run from its config to its last checkpoint."""

import math
from typing import Literal

from torch import Tensor

from imm_scale import build, distributed, storage
from imm_scale import config as configs
from imm_scale.config import Config
from imm_scale.data.loader import Batch, Loader, Reading
from imm_scale.distributed import World
from imm_scale.errors import UserError
from imm_scale.training import checkpoint as checkpoints
from imm_scale.training import metrics, resume
from imm_scale.training.checkpoint import Checkpoint, DamagedCheckpointError
from imm_scale.training.ema import ShardedEma
from imm_scale.training.engine import Engine, check_device
from imm_scale.training.identity import check_identity
from imm_scale.training.metrics import Meter
from imm_scale.training.preemption import Preemption
from imm_scale.training.run_log import RunLog, log, set_up_logging
from imm_scale.training.saver import Saver
from imm_scale.training.setup import Plan, plan

Outcome = Literal["completed", "preempted"]


def learning_rate(config: Config, images_seen: int) -> float:
    """Of the step that ends at `images_seen`: a linear rise, then the schedule."""
    optimizer, train = config.optimizer, config.train
    warmup, total = optimizer.warmup_images, train.max_steps * train.global_batch_size
    if images_seen < warmup:
        return optimizer.lr * images_seen / warmup
    if optimizer.schedule == "cosine":
        return optimizer.lr * 0.5 * (1.0 + math.cos(math.pi * (images_seen - warmup) / max(total - warmup, 1)))
    return optimizer.lr


class Trainer:
    """The live state of one run on one rank: engine, averages, clock."""

    def __init__(self, plan: Plan, world: World):
        self.plan, self.world = plan, world
        config, layout = plan.config, plan.layout
        self.device = distributed.device(world)
        resumed = resume.newest_checkpoint(config.run_dir, world)
        flow_map = build.flow_map(plan.spec, config.seed)
        resume.load_weights(flow_map, plan, resumed)
        samples = layout.slots_per_micro_batch * layout.particles
        self.engine = Engine(config, flow_map, build.objective(config), layout.num_groups, layout.accumulation, samples)
        self.ema = ShardedEma(self.engine.master_shards(), config.ema.decays)
        self.saver = Saver(plan, world, self.engine, self.ema)
        self.step = 0
        self.images_seen = 0
        self.skipped: list[tuple[int, int]] = []  # ranges of images_seen stepped over on purpose
        if resumed is not None:
            resume.restore(resumed, self.engine, self.ema)
            meta = resumed.meta
            self.step, self.images_seen, self.skipped = meta.step, meta.images_seen, list(meta.skipped)

    # --- going on ---

    def run(self) -> Outcome:
        """Trains until max_steps or until asked to stop; either way the last step is committed."""
        config = self.plan.config
        run_log = RunLog(config, self.step, self.world)
        meter = Meter(self.device, self.plan.layout.global_batch_size)
        stopping = False
        with self._loader() as loader, Preemption(self.device) as preemption:
            while self.step < config.train.max_steps and not stopping:
                loss, grad_norm, lr = self._train_step(next(loader))
                meter.add(loss, grad_norm)
                run_log.progress.advance()
                stopping = preemption.agreed()
                last = stopping or self.step == config.train.max_steps
                if last or self.step % config.train.log_every == 0:
                    data = distributed.sum_counts(loader.counters, self.device)
                    run_log.write(meter.record(self.step, self.images_seen, lr, loader.data_seconds, data))
                if last or self.step % config.train.checkpoint_every == 0:
                    self.saver.save(self.step, self.images_seen, self.skipped, run_log)
            self.saver.finish()
            preemption.drain()
        run_log.close()
        return "completed" if self.step == config.train.max_steps else "preempted"

    def _loader(self) -> Loader:
        config = self.plan.config
        assert config.data.manifest is not None
        return Loader(
            config.data.manifest,
            self.plan.layout,
            self.world.rank,
            config.seed,
            config.data.block_samples,
            self.images_seen,
            config.data.flip,
            config.flow_map.sigma_data,
            self.device,
            Reading(config.data.cache_dir, config.data.cache_bytes, config.data.on_bad_block),
        )

    def _train_step(self, batch: Batch) -> tuple[Tensor, float, float]:
        assert batch.images_seen == self.images_seen
        self.images_seen += self.plan.layout.global_batch_size
        lr = learning_rate(self.plan.config, self.images_seen)
        result = self.engine.step(batch.micro_batches(self.plan.layout.accumulation), lr)
        if not result.skipped:
            self.ema.update()
        self.step += 1
        return result.loss, result.grad_norm, lr


def open_run_folder(plan: Plan) -> int:
    """Creates the run folder, or checks that it holds the same run.

    Returns:
        The step of its newest committed checkpoint, 0 if there is none.

    Raises:
        UserError: it holds another run, or cannot be written.
    """
    config, run_dir = plan.config, plan.config.run_dir
    config_url = storage.join(run_dir, "config.yaml")
    steps = checkpoints.committed_steps(run_dir)
    if storage.exists(config_url):
        old = configs.from_yaml(storage.read_text(config_url))
        old_hash = _manifest_hash(run_dir, steps) or plan.manifest.hash
        check_identity(config, plan.manifest.hash, old, old_hash)
    return steps[-1] if steps else 0


def _manifest_hash(run_dir: str, steps: list[int]) -> str | None:
    """Of the newest checkpoint that can be read."""
    for step in reversed(steps):
        try:
            return Checkpoint.of_step(run_dir, step).meta.manifest_hash
        except DamagedCheckpointError:
            continue  # the trainer names it when it passes over it
    return None


def train(config: Config, world: World | None = None) -> Outcome:
    """Trains a run to its end, from its newest checkpoint if it has one.

    Returns:
        "completed", or "preempted" when a signal asked for it; the same stands in status.json.

    Raises:
        UserError: whatever the user can mend; nothing that was committed is touched.
    """
    world = world or distributed.detect()
    check_device(config)
    prepared = plan(config, world.size)
    if open_run_folder(prepared) >= config.train.max_steps:
        if world.is_main:
            print(f"{config.run_dir} is complete: step {config.train.max_steps} is committed")
        return "completed"
    distributed.init(world)
    distributed.barrier()  # no rank writes before all have read
    _claim_run_folder(prepared, world)
    set_up_logging(config.run_dir, world.rank)
    try:
        trainer = Trainer(prepared, world)
        outcome = trainer.run()
        _finish(trainer, outcome)
        return outcome
    except (UserError, RuntimeError, OSError) as error:
        log.error("failed: %s", error)
        _note_failure(config.run_dir, error, world.rank)
        raise


def _claim_run_folder(prepared: Plan, world: World) -> None:
    run_dir = prepared.config.run_dir

    def write() -> None:
        if world.is_main:
            storage.make_folder(run_dir)
            storage.write_text(storage.join(run_dir, "config.yaml"), configs.to_yaml(prepared.config))
            metrics.write_status(run_dir, "running", step=0)

    remedy = "make it writable or choose another run.dir"
    distributed.together(write, distributed.device(world), f"write to run.dir={run_dir}", remedy)


def _finish(trainer: Trainer, outcome: Outcome) -> None:
    distributed.barrier()
    if trainer.world.is_main:
        reason = "a signal asked the run to stop" if outcome == "preempted" else "max_steps is reached"
        clock = {"step": trainer.step, "images_seen": trainer.images_seen}
        metrics.write_status(trainer.plan.config.run_dir, outcome, reason=reason, rank=0, **clock)
    trainer.engine.close()


def _note_failure(run_dir: str, error: Exception, rank: int) -> None:
    steps = checkpoints.committed_steps(run_dir)
    try:
        metrics.write_status(run_dir, "failed", step=steps[-1] if steps else 0, reason=str(error), rank=rank)
    except OSError as second:
        log.error("status.json could not be written: %s", second)
