"""A run from its config to its last checkpoint."""

import math
from typing import Any, Literal

from torch import Tensor

from imm_scale import build, distributed, storage, weights
from imm_scale import config as configs
from imm_scale.config import Config
from imm_scale.data.loader import Batch, Loader, Reading
from imm_scale.distributed import World
from imm_scale.errors import UserError
from imm_scale.training import checkpoint as checkpoints
from imm_scale.training import metrics
from imm_scale.training.checkpoint import Checkpoint, DamagedCheckpointError, Meta
from imm_scale.training.ema import ShardedEma, state_name
from imm_scale.training.engine import Engine, check_device
from imm_scale.training.identity import check_identity
from imm_scale.training.metrics import Meter
from imm_scale.training.preemption import Preemption
from imm_scale.training.run_log import RunLog, log, set_up_logging
from imm_scale.training.setup import Plan, plan
from imm_scale.training.shard import MOMENTS

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
        resumed = self._newest_checkpoint()
        flow_map = build.flow_map(plan.spec, config.seed)
        self._load_weights(flow_map, resumed)
        samples = layout.slots_per_micro_batch * layout.particles
        self.engine = Engine(config, flow_map, build.objective(config), layout.num_groups, layout.accumulation, samples)
        self.shards = self.engine.master_shards()
        self.ema = ShardedEma(self.shards, config.ema.decays)
        self.step = 0
        self.images_seen = 0
        if resumed is not None:
            self._restore(resumed)

    # --- resuming ---

    def _newest_checkpoint(self) -> Checkpoint | None:
        """The newest intact checkpoint of the run folder; ranks share the work of hashing it."""
        run_dir = self.plan.config.run_dir
        for step in reversed(checkpoints.committed_steps(run_dir)):
            found, problem = None, ""
            try:
                found = Checkpoint.of_step(run_dir, step)
                problem = ", ".join(found.damaged_files(self.world.rank, self.world.size))
            except DamagedCheckpointError as error:
                problem = str(error)
            if distributed.all_agree(not problem, self.device):
                return found
            log.warning("checkpoint of step %d is skipped, it is damaged: %s", step, problem or "see the other ranks")
        return None

    def _load_weights(self, flow_map: Any, resumed: Checkpoint | None) -> None:
        init_from = self.plan.config.train.init_from
        if resumed is not None:
            weights.put(flow_map, resumed.weights(), resumed.url)
        elif init_from is not None:
            spec, tensors = weights.read(init_from)
            if spec.net != self.plan.spec.net:
                raise UserError(f"train.init_from={init_from} holds another net: {spec.net}, not {self.plan.spec.net}")
            weights.put(flow_map, tensors, init_from)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Moments, averages and counters; the weights went in before the engine was built."""
        targets = [
            (moment, shard.name, shard.offset, shard.states[moment])
            for shard in self.engine.held_shards()
            for moment in MOMENTS
        ]
        for decay, averages in self.ema.averages.items():
            if state_name(decay) not in checkpoint.states:
                log.warning("the checkpoint has no average of decay %g: it starts at the current weights", decay)
                continue
            pairs = zip(self.shards, averages, strict=True)
            targets += [(state_name(decay), shard.name, shard.offset, average) for shard, average in pairs]
        checkpoints.load_into(targets, checkpoint)
        self.engine.set_optimizer_steps(checkpoint.meta.optimizer_steps)
        self.step, self.images_seen = checkpoint.meta.step, checkpoint.meta.images_seen
        log.info("resumed from %s at step %d (%d images seen)", checkpoint.url, self.step, self.images_seen)

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
                    self._save(run_log)
            preemption.drain()
        run_log.close()
        return "completed" if self.step == config.train.max_steps else "preempted"

    def _loader(self) -> Loader:
        config = self.plan.config
        return Loader(
            self.plan.dataset,
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
        loss, grad_norm = self.engine.step(batch.micro_batches(self.plan.layout.accumulation), lr)
        self.ema.update()
        self.step += 1
        return loss, grad_norm, lr

    def _save(self, run_log: RunLog) -> None:
        """All ranks write, then rank 0 commits; a failed write leaves the last committed checkpoint as it is."""
        config = self.plan.config
        url = checkpoints.folder(config.run_dir, self.step)
        remedy = "the last committed checkpoint is intact: make room and start again"
        what = f"write checkpoint {url}"
        distributed.together(lambda: self._write_part(url), self.device, what, remedy)
        distributed.together(lambda: self._commit(url, run_log), self.device, what, remedy)

    def _commit(self, url: str, run_log: RunLog) -> None:
        if self.world.is_main:
            config = self.plan.config
            checkpoints.commit(url, self._meta())
            run_log.commit(self.step)
            checkpoints.prune(config.run_dir, config.train.keep_last, config.train.keep_every)
            metrics.write_status(config.run_dir, "running", step=self.step, images_seen=self.images_seen)

    def _write_part(self, url: str) -> None:
        slices = (
            (shard.name, shard.shape, shard.offset, {**shard.states, **self.ema.states(index)})
            for index, shard in enumerate(self.shards)
        )
        checkpoints.write_rank(url, self.world.rank, slices)

    def _meta(self) -> Meta:
        config = self.plan.config
        return Meta(
            step=self.step,
            images_seen=self.images_seen,
            optimizer_steps=self.engine.optimizer_steps(),
            config=configs.to_yaml(config),
            spec=self.plan.spec.to_json(),
            manifest_hash=self.plan.manifest.hash,
            world_size=self.world.size,
            zero_stage=config.zero.stage,
            versions=metrics.versions(),
        )


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
