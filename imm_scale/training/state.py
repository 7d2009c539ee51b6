"""The live state of a run on one rank: engine, averages, clock."""

from collections.abc import Iterable
from typing import Any

from imm_scale import build
from imm_scale.checkpoint import init_weights, resume
from imm_scale.checkpoint.async_saver import Saver, SaveTally
from imm_scale.checkpoint.format import Checkpoint
from imm_scale.checkpoint.run_lock import RunLock
from imm_scale.methods.base import Method
from imm_scale.parallel import world as distributed
from imm_scale.parallel.deepspeed_engine import Engine
from imm_scale.parallel.ema import ShardedEma
from imm_scale.parallel.teacher import Teacher
from imm_scale.parallel.world import World
from imm_scale.preflight import PreparedRun
from imm_scale.training import step_guard
from imm_scale.training.run_log import RunLog


class State:
    """What a checkpoint holds, alive. Made anew from a checkpoint (None: at step 0) at each start and each rewind.

    Args:
        saves: of this start so far, before a rewind.
        lock: of the run folder; None: nobody else can be there.

    Attributes:
        step, images_seen: the clock; steps that were skipped or stepped over count.
        stepped_over: ranges [first, last) of images_seen whose batches are not trained on, on purpose.
        guards: what the guards remember.
    """

    def __init__(
        self,
        prepared: PreparedRun,
        world: World,
        resumed: Checkpoint | None,
        saves: SaveTally | None = None,
        lock: RunLock | None = None,
    ):
        self.prepared, self.world = prepared, world
        config, layout = prepared.config, prepared.layout
        self.device = distributed.device(world)
        net, method = build.net(prepared.spec, config.seed), build.method(prepared.spec)
        if resumed is None:
            init_weights.load(net, prepared)
        self.engine = Engine(config, net, method, layout)
        self.ema = ShardedEma(self.engine.master_slices(), config.ema.decays, config.ema_power)
        self.saver = Saver(prepared, world, self.engine, self.ema.saved_slices(), saves, lock)
        self.step = self.images_seen = 0
        self.stepped_over: list[tuple[int, int]] = []
        self.guards: dict[str, Any] = {}
        if resumed is not None:
            resume.restore(resumed, self.engine, self.ema)
            meta = resumed.meta
            self.step, self.images_seen = meta.step, meta.images_seen
            self.stepped_over, self.guards = list(meta.skipped), dict(meta.guards)
        self._teacher = self._make_teacher(method)

    def _make_teacher(self, method: Method) -> Teacher | None:
        """Of the average that the method's target is taken from, if it names one."""
        decay = self.prepared.spec.method.teacher_decay
        if decay is None:
            return None
        teacher = Teacher(build.net(self.prepared.spec).to(self.engine.device), self.ema, decay)
        method.teacher = teacher.net
        return teacher

    def step_over(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Leaves out these batches too, when the clock comes to them."""
        self.stepped_over = step_guard.union(self.stepped_over, ranges)

    def update_averages(self) -> None:
        """A step was taken, and the clock is about to advance over its batch."""
        batch = self.prepared.layout.global_batch_size
        self.ema.update(batch / (self.images_seen + batch) if self.prepared.config.ema.warmup else 0.0)
        if self._teacher is not None:
            self._teacher.refresh()

    def advance(self) -> None:
        """A batch has been consumed."""
        self.step += 1
        self.images_seen += self.prepared.layout.global_batch_size

    def save(self, run_log: RunLog) -> None:
        self.saver.save(self.step, self.images_seen, self.stepped_over, run_log.commit, self.guards)
