"""A run from its config to its last checkpoint."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from imm_scale import build, distributed, storage, weights
from imm_scale import config as configs
from imm_scale.build import ModelSpec
from imm_scale.config import Config
from imm_scale.data import manifest as manifests
from imm_scale.data.loader import Batch, Loader, Reading
from imm_scale.data.manifest import Manifest
from imm_scale.data.plan import Layout
from imm_scale.distributed import World
from imm_scale.errors import UserError
from imm_scale.models.dit import parameter_count
from imm_scale.scaling import cost
from imm_scale.training import checkpoint as checkpoints
from imm_scale.training import metrics
from imm_scale.training.checkpoint import Checkpoint, Meta
from imm_scale.training.ema import ShardedEma, state_name
from imm_scale.training.engine import Engine, check_device
from imm_scale.training.metrics import MetricsLog, Progress, Wandb, log
from imm_scale.training.preemption import Preemption
from imm_scale.training.shard import MOMENTS

Outcome = Literal["completed", "preempted"]

# Sections and keys that make a run what it is; every other key may change when it goes on.
IDENTITY = (
    "model",
    "flow_map",
    "objective",
    "seed",
    "data.block_samples",
    "data.flip",
    "train.global_batch_size",
    "optimizer",
    "ema",
)
_ELASTIC = ("model.attention", "objective.min_gap")  # min_gap counts as resolved by the precision


@dataclass(frozen=True)
class Plan:
    """Everything that follows from a config, a manifest and a world, before anything is started."""

    config: Config
    manifest: Manifest
    layout: Layout
    spec: ModelSpec


def plan(config: Config, world_size: int) -> Plan:
    """Raises UserError for whatever can be known to be wrong before training."""
    if config.data.manifest is None:
        raise UserError("data.manifest is not set: give the manifest.json that data_tools.encode wrote")
    check_device(config)
    manifest = Manifest.load(config.data.manifest)
    manifests.check_expectations(
        manifest,
        codec=config.data.codec,
        latent_shape=None if config.data.latent_shape is None else _triple(config.data.latent_shape),
        num_classes=config.data.num_classes,
    )
    train = config.train
    layout = Layout(train.global_batch_size, config.objective.particles, world_size, train.micro_batch_size)
    return Plan(config, manifest, layout, build.model_spec(config, manifest))


def _triple(shape: list[int]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise UserError(f"data.latent_shape={shape} must be channels, height and width")
    return shape[0], shape[1], shape[2]


def identity(config: Config) -> dict[str, Any]:
    """The keys that may not differ when a run goes on, with their values."""
    values = {
        key: value
        for key, value in configs.flatten(config).items()
        if key not in _ELASTIC and any(key == part or key.startswith(f"{part}.") for part in IDENTITY)
    }
    return {**values, "objective.min_gap (resolved)": build.resolved_min_gap(config)}


def check_identity(config: Config, manifest_hash: str, old: Config, old_manifest_hash: str) -> None:
    """Raises UserError, with the keys, where a run folder was started with something else."""
    before = {**identity(old), "data.manifest (contents)": old_manifest_hash}
    now = {**identity(config), "data.manifest (contents)": manifest_hash}
    allowed = config.run.allow_change

    def is_allowed(key: str) -> bool:
        return any(key.split(" ")[0] == part or key.startswith(f"{part}.") for part in allowed)

    differing = [key for key in before if before[key] != now[key] and not is_allowed(key)]
    if differing:
        lines = "\n".join(f"  {key}: {before[key]} -> {now[key]}" for key in differing)
        keys = ",".join(key.split(" ")[0] for key in differing)
        raise UserError(
            f"{config.run_dir} holds a run with another config:\n{lines}\n"
            f"Choose another run.dir (or run.name), or go on with the change on purpose: run.allow_change=[{keys}]"
        )


def learning_rate(config: Config, images_seen: int) -> float:
    """Of the step that ends at `images_seen`: a linear rise, then constant."""
    warmup = config.optimizer.warmup_images
    return config.optimizer.lr * (min(1.0, images_seen / warmup) if warmup else 1.0)


class Meter:
    """Sums what happens between two records."""

    def __init__(self, device: torch.device, global_batch_size: int):
        self._device, self._batch = device, global_batch_size
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._grad_norm, self._steps = 0.0, 0
        self._began = time.perf_counter()

    def add(self, loss: Tensor, grad_norm: float) -> None:
        self._loss += loss
        self._grad_norm += grad_norm
        self._steps += 1

    def record(
        self, step: int, images_seen: int, lr: float, data_seconds: float, data: dict[str, int]
    ) -> dict[str, Any]:
        """Means over the steps since the last record; a collective, so every rank calls it."""
        loss = float(distributed.all_sum(self._loss)) / self._steps
        seconds = (time.perf_counter() - self._began) / self._steps
        record = {
            "step": step,
            "images_seen": images_seen,
            "loss": loss,
            "grad_norm": self._grad_norm / self._steps,
            "lr": lr,
            "images_per_second": self._batch / seconds,
            "step_seconds": seconds,
            "data_seconds": data_seconds / self._steps,
            **{f"data_{name}": count for name, count in data.items()},
            "memory_bytes": metrics.memory_bytes(self._device),
            "time": time.time(),
        }
        self._reset()
        return record


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
            found = Checkpoint.of_step(run_dir, step)
            damaged = found.damaged_files(self.world.rank, self.world.size)
            if distributed.all_agree(not damaged, self.device):
                return found
            log.warning("checkpoint of step %d is skipped, its files are damaged: %s", step, ", ".join(damaged))
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
        config, layout = self.plan.config, self.plan.layout
        assert config.data.manifest is not None
        loader = Loader(
            config.data.manifest,
            layout,
            self.world.rank,
            config.seed,
            config.data.block_samples,
            self.images_seen,
            config.data.flip,
            config.flow_map.sigma_data,
            self.device,
            Reading(config.data.cache_dir, config.data.cache_bytes, config.data.on_bad_block),
        )
        run_log = RunLog(config, self.step, self.world)
        meter = Meter(self.device, layout.global_batch_size)
        waited = 0.0
        with loader, Preemption(self.device) as preemption:
            outcome: Outcome = "completed"
            while self.step < config.train.max_steps and outcome == "completed":
                loss, grad_norm, lr = self._train_step(next(loader))
                meter.add(loss, grad_norm)
                run_log.progress.advance()
                if preemption.agreed():
                    outcome = "preempted"
                last = self.step == config.train.max_steps or outcome == "preempted"
                if last or self.step % config.train.log_every == 0:
                    data = distributed.sum_counts(loader.counters, self.device)
                    run_log.write(meter.record(self.step, self.images_seen, lr, loader.data_seconds - waited, data))
                    waited = loader.data_seconds
                if last or self.step % config.train.checkpoint_every == 0:
                    self._save(run_log)
            preemption.drain()
        run_log.close()
        return outcome if self.step < config.train.max_steps else "completed"

    def _train_step(self, batch: Batch) -> tuple[Tensor, float, float]:
        assert batch.images_seen == self.images_seen
        self.images_seen += self.plan.layout.global_batch_size
        lr = learning_rate(self.plan.config, self.images_seen)
        loss, grad_norm = self.engine.step(batch.micro_batches(self.plan.layout.accumulation), lr)
        self.ema.update()
        self.step += 1
        return loss, grad_norm, lr

    def _save(self, run_log: "RunLog") -> None:
        """All ranks write, then rank 0 commits; a failed write leaves the last committed checkpoint as it is."""
        config = self.plan.config
        url = checkpoints.folder(config.run_dir, self.step)
        self._together(url, lambda: self._write_part(url))
        self._together(url, lambda: checkpoints.commit(url, self._meta()) if self.world.is_main else None)
        if self.world.is_main:
            run_log.commit(self.step)
            checkpoints.prune(config.run_dir, config.train.keep_last, config.train.keep_every)
            metrics.write_status(config.run_dir, "running", step=self.step, images_seen=self.images_seen)

    def _together(self, url: str, action: Callable[[], None]) -> None:
        """Runs a part of saving on every rank and goes on only when it worked on all. Raises UserError."""
        problem = "it failed on another rank"
        try:
            action()
            worked = True
        except OSError as error:
            worked, problem = False, str(error)
        if not distributed.all_agree(worked, self.device):
            raise UserError(
                f"cannot write checkpoint {url}: {problem}. The last committed checkpoint is intact: "
                "make room (or set run.dir elsewhere) and start again"
            )

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


class RunLog:
    """Rank 0's records: metrics.jsonl, wandb and what is on the screen."""

    def __init__(self, config: Config, step: int, world: World):
        self._main = world.is_main
        self.progress = Progress(config.run.name, step, config.train.max_steps, self._main)
        if self._main:
            self._metrics = MetricsLog(config.run_dir, step)
            self._wandb = Wandb(config) if config.wandb.mode != "disabled" else None

    def write(self, record: dict[str, Any]) -> None:
        if self._main:
            self._metrics.append(record)
            self.progress.report(record)
            if self._wandb is not None:
                self._wandb.log(record)

    def commit(self, step: int) -> None:
        self._metrics.commit(step)

    def close(self) -> None:
        self.progress.close()
        if self._main and self._wandb is not None:
            self._wandb.finish()


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
        old_hash = Checkpoint.of_step(run_dir, steps[-1]).meta.manifest_hash if steps else plan.manifest.hash
        check_identity(config, plan.manifest.hash, old, old_hash)
    return steps[-1] if steps else 0


def _write_config(plan: Plan) -> None:
    config = plan.config
    try:
        storage.make_folder(config.run_dir)
        storage.write_text(storage.join(config.run_dir, "config.yaml"), configs.to_yaml(config))
    except OSError as error:
        raise UserError(f"cannot write to run.dir={config.run_dir}: {error}") from error


def train(config: Config, world: World | None = None) -> Outcome:
    """Trains a run to its end, from its newest checkpoint if it has one.

    Returns:
        "completed", or "preempted" when a signal asked for it; the same stands in status.json.

    Raises:
        UserError: whatever the user can mend; nothing that was committed is touched.
    """
    world = world or distributed.detect()
    prepared = plan(config, world.size)
    if open_run_folder(prepared) >= config.train.max_steps:
        if world.is_main:
            print(f"{config.run_dir} is complete: step {config.train.max_steps} is committed")
        return "completed"
    distributed.init(world)
    distributed.barrier()  # no rank writes before all have read
    if world.is_main:
        _write_config(prepared)
        metrics.write_status(config.run_dir, "running", step=0)
    distributed.barrier()
    metrics.set_up_logging(config.run_dir, world.rank)
    trainer: Trainer | None = None
    try:
        trainer = Trainer(prepared, world)
        outcome = trainer.run()
        distributed.barrier()
        if world.is_main:
            details = {"step": trainer.step, "images_seen": trainer.images_seen}
            reason = "asked to stop by a signal" if outcome == "preempted" else "max_steps reached"
            metrics.write_status(config.run_dir, outcome, reason=reason, rank=0, **details)
        trainer.engine.close()
        return outcome
    except (UserError, RuntimeError, OSError) as error:
        step = trainer.step if trainer is not None else 0
        log.error("failed at step %d: %s", step, error)
        _note_failure(config.run_dir, step, error, world.rank)
        raise


def _note_failure(run_dir: str, step: int, error: Exception, rank: int) -> None:
    try:
        metrics.write_status(run_dir, "failed", step=step, reason=str(error), rank=rank)
    except OSError as second:
        log.error("status.json could not be written: %s", second)


def describe(config: Config, world_size: int) -> str:
    """The resolved config and what it means on so many ranks, as `--dry-run` prints it."""
    prepared = plan(config, world_size)
    layout, net, samples = prepared.layout, prepared.spec.net, prepared.manifest.num_samples
    forward = cost.forward_multiply_adds(net)
    step = cost.training_multiply_adds(net, config.objective.name, layout.global_batch_size)
    micro = layout.slots_per_micro_batch * layout.particles
    lines = [
        f"global batch       {layout.global_batch_size} = micro-batch {micro} x accumulation {layout.accumulation} "
        f"x {world_size} ranks" + (" (the last slots of some ranks stay empty)" if _has_padding(layout) else ""),
        f"groups             {layout.num_groups} of {layout.particles} particles, {layout.slots_per_rank} on a rank",
        f"parameters         {parameter_count(net):,} (with the position table)",
        f"forward pass       {forward / 1e9:.4g} G multiply-adds per image",
        f"training step      {step / 1e12:.4g} T multiply-adds",
        f"data               {samples:,} images, {samples // layout.global_batch_size} steps per epoch, "
        f"{config.train.max_steps * layout.global_batch_size / samples:.4g} epochs in all",
        f"run folder         {config.run_dir}",
    ]
    return configs.to_yaml(config) + "\n" + "\n".join(lines)


def _has_padding(layout: Layout) -> bool:
    return layout.slots * layout.world_size > layout.num_groups
