"""Going on from a checkpoint: which one, its weights, its moments, averages and counters."""

import logging

from imm_scale import distributed, weights
from imm_scale.distributed import World
from imm_scale.errors import UserError
from imm_scale.flow_map import FlowMap
from imm_scale.training import checkpoint as checkpoints
from imm_scale.training.checkpoint import Checkpoint, DamagedCheckpointError
from imm_scale.training.ema import ShardedEma, state_name
from imm_scale.training.engine import Engine
from imm_scale.training.loss_scale import LossScale
from imm_scale.training.setup import Plan
from imm_scale.training.shard import MOMENTS

log = logging.getLogger("imm_scale")


def newest_checkpoint(run_dir: str, world: World) -> Checkpoint | None:
    """The newest intact checkpoint of the run folder, the same on every rank; ranks share the work of hashing it."""
    for step in reversed(checkpoints.committed_steps(run_dir)):
        found, problem = None, ""
        try:
            found = Checkpoint.of_step(run_dir, step)
            problem = ", ".join(found.damaged_files(world.rank, world.size))
        except DamagedCheckpointError as error:
            problem = str(error)
        if distributed.all_agree(not problem, distributed.device(world)):
            return found
        log.warning("checkpoint of step %d is skipped, it is damaged: %s", step, problem or "see the other ranks")
    return None


def load_weights(flow_map: FlowMap, plan: Plan, resumed: Checkpoint | None) -> None:
    """Puts the checkpoint's weights, or those of `train.init_from`, into a fresh net.

    Raises:
        UserError: `train.init_from` holds another net.
    """
    init_from = plan.config.train.init_from
    if resumed is not None:
        weights.put(flow_map, resumed.weights(), resumed.url)
    elif init_from is not None:
        spec, tensors = weights.read(init_from)
        if spec.net != plan.spec.net:
            raise UserError(f"train.init_from={init_from} holds another net: {spec.net}, not {plan.spec.net}")
        weights.put(flow_map, tensors, init_from)


def restore(checkpoint: Checkpoint, engine: Engine, ema: ShardedEma) -> None:
    """Moments, averages and the optimizer's counter; the weights went in before the engine was built."""
    targets = [
        (moment, shard.name, shard.offset, shard.states[moment]) for shard in engine.held_shards() for moment in MOMENTS
    ]
    for decay, averages in ema.averages.items():
        if state_name(decay) not in checkpoint.states:
            log.warning("the checkpoint has no average of decay %g: it starts at the current weights", decay)
            continue
        pairs = zip(ema.shards, averages, strict=True)
        targets += [(state_name(decay), shard.name, shard.offset, average) for shard, average in pairs]
    checkpoints.load_into(targets, checkpoint)
    engine.set_optimizer_steps(checkpoint.meta.optimizer_steps)
    if engine.loss_scale is not None and checkpoint.meta.loss_scale is not None:
        engine.loss_scale = LossScale(checkpoint.meta.loss_scale, checkpoint.meta.loss_scale_good_steps)
    log.info(
        "resumed from %s at step %d (%d images seen)",
        checkpoint.url,
        checkpoint.meta.step,
        checkpoint.meta.images_seen,
    )
