"""Writing checkpoints while a run goes on."""

from collections.abc import Sequence

from imm_scale import config as configs
from imm_scale import distributed
from imm_scale.distributed import World
from imm_scale.training import checkpoint as checkpoints
from imm_scale.training import metrics
from imm_scale.training.checkpoint import Meta
from imm_scale.training.ema import ShardedEma
from imm_scale.training.engine import Engine
from imm_scale.training.run_log import RunLog
from imm_scale.training.setup import Plan

Ranges = Sequence[tuple[int, int]]


class Saver:
    """Saves the state of a run; all ranks call it at the same steps.

    Attributes:
        failed_checkpoints: saves that did not end in a commit.
    """

    def __init__(self, plan: Plan, world: World, engine: Engine, ema: ShardedEma):
        self._plan, self._world, self._engine, self._ema = plan, world, engine, ema
        self.failed_checkpoints = 0

    def save(self, step: int, images_seen: int, skipped: Ranges, run_log: RunLog) -> None:
        """All ranks write, then rank 0 commits; a failed write leaves the last committed checkpoint as it is.

        Args:
            skipped: ranges [first, last) of images_seen that were stepped over on purpose.
        """
        url = checkpoints.folder(self._plan.config.run_dir, step)
        remedy = "the last committed checkpoint is intact: make room and start again"
        what, device = f"write checkpoint {url}", distributed.device(self._world)
        meta = self._meta(step, images_seen, skipped)
        distributed.together(lambda: self._write_part(url), device, what, remedy)
        distributed.together(lambda: self._commit(url, meta, run_log), device, what, remedy)

    def wait(self) -> None:
        """Waits until what is being saved is committed."""

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def _commit(self, url: str, meta: Meta, run_log: RunLog) -> None:
        if self._world.is_main:
            config = self._plan.config
            checkpoints.commit(url, meta)
            run_log.commit(meta.step)
            checkpoints.prune(config.run_dir, config.train.keep_last, config.train.keep_every)
            metrics.write_status(config.run_dir, "running", step=meta.step, images_seen=meta.images_seen)

    def _write_part(self, url: str) -> None:
        slices = (
            (shard.name, shard.shape, shard.offset, {**shard.states, **self._ema.states(index)})
            for index, shard in enumerate(self._ema.shards)
        )
        checkpoints.write_rank(url, self._world.rank, slices)

    def _meta(self, step: int, images_seen: int, skipped: Ranges) -> Meta:
        config, loss_scale = self._plan.config, self._engine.loss_scale
        return Meta(
            step=step,
            images_seen=images_seen,
            optimizer_steps=self._engine.optimizer_steps(),
            config=configs.to_yaml(config),
            spec=self._plan.spec.to_json(),
            manifest_hash=self._plan.manifest.hash,
            world_size=self._world.size,
            zero_stage=config.zero.stage,
            versions=metrics.versions(),
            loss_scale=None if loss_scale is None else loss_scale.value,
            loss_scale_good_steps=0 if loss_scale is None else loss_scale.good_steps,
            skipped=tuple(skipped),
        )
