"""Evaluating a run's checkpoints as they come, as a job of its own."""

import time
from collections.abc import Callable

import torch

from imm_scale import storage
from imm_scale.checkpoint import format as checkpoints
from imm_scale.checkpoint import run_folder
from imm_scale.config.schema import Config
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World
from imm_scale.sampling.source import Source, unless_removed

ENDED = ("completed", "failed")  # a preempted run goes on


def watch(
    config: Config,
    world: World,
    prepare: Callable[[Source], Callable[[], object]],
    announce: Callable[[str], None],
    poll: float,
    pause: Callable[[float], None] = time.sleep,
) -> list[int]:
    """Measures every committed checkpoint, oldest first, until the run has ended and all are done.

    A checkpoint that the run removes before its turn is skipped, and that is announced.

    Args:
        prepare: reads one checkpoint and returns what measures it; that finds by itself what was measured before.
        poll: seconds between looks at the run folder.

    Returns:
        The steps measured.
    """
    run_dir = config.run_dir
    done: list[int] = []
    passed: set[int] = set()
    while True:
        # Read before the list of checkpoints: the last one is committed before the status says so.
        state, steps = _look(run_dir, world)
        waiting = [step for step in steps if step not in done and step not in passed]
        if not waiting and state in ENDED:
            if world.is_main:
                announce(f"{run_dir} is {state}: {len(done)} checkpoints measured")
            return done
        if not waiting:
            pause(poll)
            continue
        step = waiting[0]
        measure = unless_removed(Source(run_dir, run_dir, step), prepare)
        if distributed.all_agree(measure is not None, distributed.device(world)):
            assert measure is not None
            measure()
            done.append(step)
        else:
            passed.add(step)
            if world.is_main:
                announce(f"step {step} was removed by the run before it was measured: train.keep_last keeps too few")


def _look(run_dir: str, world: World) -> tuple[str, list[int]]:
    """State and committed steps as rank 0 sees them, the same on every rank."""
    state, steps = "", []
    if world.is_main:
        state = str(run_folder.read_status(run_dir).get("state", ""))
        steps = checkpoints.committed_steps(run_dir)
    ended = ENDED.index(state) + 1 if state in ENDED else 0
    ended, count = distributed.all_sum(torch.tensor([ended, len(steps)])).tolist()
    listed = torch.tensor(steps if world.is_main else [0] * count, dtype=torch.int64)
    state = ENDED[ended - 1] if ended else "running"
    return state, distributed.all_sum(listed).tolist() if count else []


def wait_for_run(run_dir: str, announce: Callable[[str], None], poll: float) -> None:
    """Returns when the run folder has its config: a job that watches may start before the one it watches."""
    url = storage.join(run_dir, "config.yaml")
    if not storage.exists(url):
        announce(f"waiting for {run_dir} to be started")
    while not storage.exists(url):
        time.sleep(poll)
