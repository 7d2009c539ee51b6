"""A run from its config to its last checkpoint."""

import sys

import torch

from imm_scale import config as configs
from imm_scale import storage
from imm_scale.checkpoint import format as checkpoints
from imm_scale.checkpoint import init_weights, resume, run_folder, run_lock
from imm_scale.checkpoint.async_saver import SaveTally, remove_leftovers
from imm_scale.checkpoint.format import Checkpoint
from imm_scale.checkpoint.run_lock import LostLockError, RunLock
from imm_scale.config.schema import Config
from imm_scale.data.sample_order import Layout
from imm_scale.errors import UserError
from imm_scale.parallel import world as distributed
from imm_scale.parallel.deepspeed_engine import check_device
from imm_scale.parallel.world import World
from imm_scale.preflight import PreparedRun, prepare
from imm_scale.training import stop_signals, watchdog
from imm_scale.training.loop import Loop, Outcome, RunContext
from imm_scale.training.run_log import check_wandb_key, log, set_up_logging
from imm_scale.training.state import State
from imm_scale.training.step_guard import Rewind, Rewinds
from imm_scale.training.stop_signals import StopSignals


def train(config: Config, world: World | None = None) -> Outcome:
    """Trains a run to its end, from its newest checkpoint if it has one.

    Returns:
        "completed", or "preempted" when a signal asked for it; the same stands in status.json.

    Raises:
        UserError: whatever the user can mend; nothing that was committed is touched.
        RunError: steps that are skipped or spike again and again.
    """
    world = world or distributed.detect()
    check_device(config)
    prepared = prepare(config, world.size)
    resume.check_run_folder(prepared)
    distributed.init(world, patience=watchdog.collective_patience(config.train.step_timeout))
    if _is_complete(config, world):
        return "completed"
    check_wandb_key(config, world)
    with run_lock.held(config.run_dir, world, _say) as lock:
        resume.check_run_folder(prepared)  # once more: another start may have come and gone since
        resume_point = resume.find(config, world)
        if resume_point.checkpoint is None:
            init_weights.check(prepared)
        else:
            resume.check_net(resume_point.checkpoint, prepared.spec)
        distributed.barrier()  # no rank writes before all have read
        with StopSignals(config.train.stop_signals) as signals:
            return _start(prepared, world, lock, signals, resume_point)


def _is_complete(config: Config, world: World) -> bool:
    """Whether there is nothing left to do, so that a folder that may only be read will do."""
    steps = checkpoints.committed_steps(config.run_dir) if world.is_main else []
    there = bool(steps) and steps[-1] >= config.train.max_steps
    if not distributed.gather_objects(there, world)[0] or resume.find(config, world).step < config.train.max_steps:
        return False
    if world.is_main:
        print(f"{config.run_dir} is complete: step {config.train.max_steps} is committed")
    return True


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _start(
    prepared: PreparedRun, world: World, lock: RunLock, signals: StopSignals, resume_point: resume.ResumePoint
) -> Outcome:
    """Writes into the folder, which is this run's from here on; a failure is noted there."""
    config = prepared.config
    _write_config(prepared, world)
    set_up_logging(config.run_dir, world.rank)
    for problem in (*resume_point.passed_over, *(prepared.cautions if world.is_main else ())):
        log.warning(problem)
    try:
        remove_leftovers(config, world)
        deadline = stop_signals.deadline(config.train.stop_before)
        context = RunContext(*watchdog.hosts_and_call(world), signals, deadline, lock)
        return _train(prepared, world, context, resume_point.checkpoint)
    except torch.OutOfMemoryError as error:
        remedy = _out_of_memory(config, prepared.layout, error)
        _note_failure(config.run_dir, remedy, world.rank, lock)
        raise remedy from error
    except (UserError, RuntimeError, OSError) as error:
        _note_failure(config.run_dir, error, world.rank, lock)
        raise


def _train(prepared: PreparedRun, world: World, context: RunContext, checkpoint: Checkpoint | None) -> Outcome:
    """Goes on from a checkpoint, and after each spike from the newest one, as if started again."""
    config = prepared.config
    rewinds, rewind, saves = Rewinds(config.train.max_rewinds), None, SaveTally()
    while True:
        state = State(prepared, world, checkpoint, saves, context.lock)
        if rewind is not None:
            rewinds.add(rewind, state.step, config.train.global_batch_size)
        state.step_over(rewinds.ranges)
        loop = Loop(state, context)
        try:
            outcome = loop.run()
        except Rewind as error:
            rewind = error.with_traceback(None)  # which would keep all that its frames hold
            loop.run_log.close()
            engine = state.engine
            del state, loop  # their slices are the engine's memory: nothing of it may be there when the next one comes
            engine.close()
            checkpoint = resume.find(config, world).checkpoint
            continue
        _finish(loop, outcome)
        return outcome


def _write_config(prepared: PreparedRun, world: World) -> None:
    run_dir = prepared.config.run_dir

    def write() -> None:
        if world.is_main:
            storage.write_text(storage.join(run_dir, "config.yaml"), configs.to_yaml(prepared.config))
            run_folder.write_status(run_dir, "running", step=0)

    remedy = "make it writable or choose another run.dir"
    distributed.all_ranks_or_raise(write, distributed.device(world), f"write to run.dir={run_dir}", remedy)


def _finish(loop: Loop, outcome: Outcome) -> None:
    """Says how it ended, once all ranks have got there; and lets all ranks leave together, because launchers kill the
    others at the first exit."""
    state, signals = loop.state, loop.context.signals
    distributed.barrier()
    if state.world.is_main:
        if loop.context.lock is not None:
            loop.context.lock.verify()
        reason = "max_steps is reached"
        if outcome == "preempted":
            reason = f"{signals.heard or 'a signal on another rank or the end of the job'} asked the run to stop"
        clock = {"step": state.step, "images_seen": state.images_seen}
        run_folder.write_status(state.prepared.config.run_dir, outcome, reason=reason, rank=0, **clock)
    loop.run_log.close()
    state.engine.close()
    distributed.barrier()


def _out_of_memory(config: Config, layout: Layout, error: torch.OutOfMemoryError) -> UserError:
    """What to do where a micro-batch, or what a rank holds beside it, is too large for the device."""
    samples = layout.samples_per_micro_batch
    remedies = [
        f"a smaller train.micro_batch_size (a rank runs {samples} samples at once)" * (samples > layout.particles),
        "train.activation_checkpointing=true" * (not config.train.activation_checkpointing),
        f"a higher zero.stage (now {config.zero.stage})" * (config.zero.stage < 3),
        "zero.offload=optimizer" * (config.zero.offload == "none"),
    ]
    cause = str(error).split(". ")[0].strip()
    ways = "; ".join(filter(None, remedies)) or "a smaller model or GPUs with more memory"
    return UserError(f"the GPU's memory is too small: {cause}. Take {ways}. `imm-scale plan` shows what fits")


def _note_failure(run_dir: str, error: Exception, rank: int, lock: RunLock) -> None:
    """Writes what ended this rank, unless the folder is another start's by now."""
    log.error("failed: %s", error)
    try:
        lock.verify()
        steps = checkpoints.committed_steps(run_dir)
        run_folder.write_failure(run_dir, str(error), step=steps[-1] if steps else 0, rank=rank)
    except (OSError, LostLockError) as second:
        log.error("status.json could not be written: %s", second)
