"""Going on from a checkpoint: which one, what it holds for this rank, and the proof that all of it arrived."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from imm_scale import config as configs
from imm_scale import storage
from imm_scale.build import ModelSpec
from imm_scale.checkpoint import averages as saved_averages
from imm_scale.checkpoint import format as checkpoints
from imm_scale.checkpoint.format import Checkpoint, DamagedCheckpointError
from imm_scale.checkpoint.identity import check_identity
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.parallel import world as distributed
from imm_scale.parallel.deepspeed_engine import Engine
from imm_scale.parallel.ema import ShardedEma, state_name
from imm_scale.parallel.loss_scale import LossScale
from imm_scale.parallel.param_slice import MOMENTS
from imm_scale.parallel.world import World
from imm_scale.preflight import PreparedRun

log = logging.getLogger("imm_scale")


# --- which one ---


def check_run_folder(prepared: PreparedRun) -> None:
    """Raises UserError where the run folder holds another run. One without checkpoints holds nothing to go on from."""
    config, run_dir = prepared.config, prepared.config.run_dir
    config_url = storage.join(run_dir, "config.yaml")
    if storage.exists(config_url) and checkpoints.committed_steps(run_dir):
        old = configs.from_yaml(storage.read_text(config_url))
        check_identity(config, prepared.manifest.hash, old, _manifest_hash(run_dir) or prepared.manifest.hash)


def _manifest_hash(run_dir: str) -> str | None:
    """Of the newest checkpoint that can be read."""
    for step in reversed(checkpoints.committed_steps(run_dir)):
        try:
            return Checkpoint.of_step(run_dir, step).meta.manifest_hash
        except DamagedCheckpointError:
            continue  # `find` says so
    return None


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on: at a checkpoint, or at step 0 where there is none; and what was skipped, and why."""

    checkpoint: Checkpoint | None
    passed_over: Sequence[str]

    @property
    def step(self) -> int:
        """The step to go on from; 0 for a fresh start."""
        return 0 if self.checkpoint is None else self.checkpoint.meta.step


def find(config: Config, world: World) -> ResumePoint:
    """The newest intact checkpoint of the run folder, the same on every rank; ranks share the work of hashing it.

    Raises:
        UserError: there are checkpoints, but none is intact, and `run.from_scratch` is not set.
    """
    run_dir, device = config.run_dir, distributed.device(world)
    passed_over = [
        f"checkpoint of step {step} is skipped: it was never committed"
        for step in reversed(checkpoints.uncommitted_steps(run_dir))
    ]
    steps = checkpoints.committed_steps(run_dir)
    for step in reversed(steps):
        checkpoint, problem = None, ""
        try:
            checkpoint = Checkpoint.of_step(run_dir, step)
            problem = ", ".join(checkpoint.damaged_files(world.rank, world.size))
        except DamagedCheckpointError as error:
            problem = str(error)
        problem = distributed.problems(problem, device)
        if not problem:
            return ResumePoint(checkpoint, passed_over)
        passed_over.append(f"checkpoint of step {step} is skipped, it is damaged: {problem}")
    if steps and not config.run.from_scratch:
        raise UserError(
            f"{run_dir} holds checkpoints, but none is intact:\n  " + "\n  ".join(passed_over) + "\nRestore a file, "
            "choose another run.dir, or start at step 0 on purpose: run.from_scratch=true"
        )
    return ResumePoint(None, passed_over)


# --- what it holds ---


def restore(checkpoint: Checkpoint, engine: Engine, ema: ShardedEma) -> None:
    """Takes weights, moments, averages, counters and loss scale from a checkpoint, into an engine of any age.

    Every rank reads its own slices and no more. An average that the checkpoint lacks starts at its weights.

    Raises:
        UserError: what arrived is not what was saved.
    """
    meta, slices = checkpoint.meta, list(engine.held_slices())
    targets = [(state, part, tensor) for part in slices for state, tensor in part.states.items()]
    checkpoints.load_into([(state, part.name, part.offset, tensor) for state, part, tensor in targets], checkpoint)
    engine.publish_weights()
    engine.set_optimizer_steps(meta.optimizer_steps)
    if engine.loss_scale is not None and meta.loss_scale is not None:
        engine.loss_scale = LossScale(meta.loss_scale, meta.loss_scale_good_steps)
    ema.restart()
    for decay, averages in ema.averages.items():
        state = saved_averages.state_of(checkpoint, decay)
        if state is None:
            log.warning("the checkpoint has no average of decay %r: it starts at the current weights", decay)
            continue
        pairs = zip(ema.slices, averages, strict=True)
        checkpoints.load_into([(state, s.name, s.offset, average) for s, average in pairs], checkpoint)
    _prove(checkpoint, engine, ema)
    log.info("resumed from %s at step %d (%d images seen)", checkpoint.url, meta.step, meta.images_seen)


def check_net(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raises UserError where a checkpoint holds another net than the config's, before anything is built or written."""
    with torch.device("meta"):
        net = spec.net.build()
    for name, parameter in net.named_parameters():
        saved, here = checkpoint.shapes.get(name), tuple(parameter.shape)
        if saved != here:
            there = "missing" if saved is None else list(saved)
            raise UserError(
                f"{checkpoint.url} holds another net: {name} is {there} there and {list(here)} here. Use the net it "
                "was trained with, or choose another run.dir"
            )


# --- the proof ---


def _prove(checkpoint: Checkpoint, engine: Engine, ema: ShardedEma) -> None:
    """Compares what the engine will step with, read back from it, with what was saved. Raises UserError."""
    expected, steps = checkpoint.checksums, checkpoint.meta.optimizer_steps
    for decay in ema.averages:
        state = saved_averages.state_of(checkpoint, decay)
        if state in expected:
            expected[state_name(decay)] = expected.pop(state)
    remedy = f"remove {checkpoint.url} to go on from the checkpoint before it"
    for state, (checksum, elements) in _read_back(engine, ema).items():
        if state in expected and checksum != expected[state]:
            raise UserError(f"{checkpoint.url}: {state} did not arrive as it was saved; {remedy}")
        if steps > 0 and elements == 0:
            raise UserError(f"{checkpoint.url}: {state} is zero after {steps} optimizer steps; {remedy}")
    if engine.optimizer_steps() != steps:
        raise UserError(f"the optimizer counts {engine.optimizer_steps()} steps, the checkpoint {steps}; {remedy}")


def _read_back(engine: Engine, ema: ShardedEma) -> dict[str, tuple[int, int]]:
    """{state: (its checksum, how many of its elements are not zero)} over all ranks."""
    names = ["weight", *MOMENTS, *(state_name(decay) for decay in ema.averages)]
    totals = torch.zeros(len(names), 2, dtype=torch.int64, device=engine.device)
    for index, part in enumerate(engine.master_slices()):
        for state, tensor in {**part.states, **ema.states(index)}.items():
            row = totals[names.index(state)]
            row[0] += checkpoints.checksum(part.name, part.offset, tensor).to(engine.device)
            row[1] += torch.count_nonzero(tensor).to(engine.device)
    distributed.all_sum(totals)
    return {name: (checksum, elements) for name, (checksum, elements) in zip(names, totals.tolist(), strict=True)}
