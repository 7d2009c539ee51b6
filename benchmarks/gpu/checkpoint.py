"""A checkpoint of the largest net: memory for its copy, the copy, what a step waits, and steps beside the writing."""

import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import abilities, training
from benchmarks.gpu.report import Context, Report
from benchmarks.gpu.step import LARGEST
from benchmarks.gpu.timing import Budget, Stopwatch, compilation, part, wait
from imm_scale.data.loader import Batch
from imm_scale.training.run_log import RunLog
from imm_scale.training.state import State

_COPIES = 3
_STEPS_BESIDE = 24  # at most
_SECONDS_A_BYTE = 1e-9  # of a save beside the writing: hashes and checks, on one core
_AT_MOST = 0.1  # wait of a save over a step, aimed at


def run(context: Context, report: Report) -> None:
    budget = Budget(context, "checkpoint")
    why_not = abilities.lacks_compiler(context)
    if why_not:
        report.skip("compiled", f"{why_not}: the steps below ran eagerly")
    samples = training.samples_of(context)
    settings = training.config(context, LARGEST, samples, f"train.compile={not why_not}".lower())
    with compilation(context), part(report, LARGEST), training.training_state(settings) as state:
        batch = training.random_batch(state.prepared.spec.net, samples, state.device)
        _memory(report, state)
        (step,) = Stopwatch(context).medians(lambda: _step(state, batch))
        report.figure("a step, no save under way", 1e3 * step, "ms")
        _waits(report, state, batch, step)
        rate = _disk_rate(context.out)
        report.figure("the disk, written and synchronized", rate / 1e9, "GB/s")
        if budget.allows(report, "a save", round(_size(state) * (1.0 / rate + _SECONDS_A_BYTE))):
            _save(context, report, state, batch, step)


def _step(state: State, batch: Batch) -> None:
    state.engine.step([batch], 1e-4)
    state.ema.update()


def _size(state: State) -> int:
    """Bytes of what this rank saves."""
    sizes = (shard.numel * (len(shard.states) + len(state.ema.averages)) for shard in state.ema.slices)
    return 4 * sum(sizes)


def _memory(report: Report, state: State) -> None:
    copy, size = state.saver._copy, _size(state)
    report.figure("state", size / 1e9, "GB")
    began = time.perf_counter()
    problem = copy.allocate(pinned=copy.from_gpu)
    seconds = time.perf_counter() - began
    if problem:
        report.skip("pinned memory", problem)
        copy.allocate(pinned=False)
    else:
        report.figure(f"host memory for it, {'pinned' if copy.from_gpu else 'pageable'}", seconds, "s")
    report.figure("copy to it", size / statistics.median(_copy_seconds(state)) / 1e9, "GB/s")


def _copy_seconds(state: State) -> list[float]:
    copy, seconds = state.saver._copy, []
    for _ in range(_COPIES):
        wait(state.device)
        copy.begin()
        began = time.perf_counter()
        copy.take()
        seconds.append(time.perf_counter() - began)
    return seconds


def _disk_rate(folder: Path) -> float:
    """Bytes a second into a file of 256 MB."""
    chunk, path = os.urandom(1 << 24), folder / "disk"
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(16):
            file.write(chunk)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return 16 * len(chunk) / seconds


class Held:
    """Seconds that steps have waited for a copy since this was made."""

    def __init__(self, state: State):
        self.seconds = 0.0
        self._wait: Callable[[], object] = state.engine.before_update
        state.engine.before_update = self._hold

    def _hold(self) -> None:
        began = time.perf_counter()
        self._wait()
        self.seconds += time.perf_counter() - began


def _waits(report: Report, state: State, batch: Batch, step: float) -> None:
    """The copy alone, as a save begins it and the next update waits for it: nothing is written."""
    held, waits, beside = Held(state), [], []
    for _ in range(_COPIES):
        wait(state.device)
        held.seconds, began = 0.0, time.perf_counter()
        state.saver._copy.begin()
        thread = threading.Thread(target=state.saver._copy.take)
        thread.start()
        _step(state, batch)
        wait(state.device)
        beside.append(time.perf_counter() - began)
        waits.append(held.seconds)
        thread.join()
    report.goal("wait of a save over a step", statistics.median(waits) / step, at_most=_AT_MOST)
    report.figure("a step and the copy begun before it, over a step", statistics.median(beside) / step)


def _save(context: Context, report: Report, state: State, batch: Batch, step: float) -> None:
    """One save, written to the disk of `--out`."""
    free = shutil.disk_usage(context.out).free
    if free < 2 * _size(state):
        report.skip("a save", f"{context.out} has {free / 1e9:.1f} GB free, a checkpoint and room beside it are more")
        return
    log, held = RunLog(state.prepared.config, state.step, state.world), Held(state)
    wait(state.device)
    began = time.perf_counter()
    state.save(log)
    called = time.perf_counter() - began
    beside = [_timed(state, batch)]
    report.figure("a save: its call and its wait, over a step", (called + held.seconds) / step)
    under_way = state.saver._under_way
    while under_way is not None and not under_way.done() and len(beside) < _STEPS_BESIDE:
        beside.append(_timed(state, batch))
    report.figure(f"a step beside the writing of a save, over a step ({len(beside)} steps)", _beside(beside, step))
    state.saver.finish()
    report.figure("a save, from its call to its commit", time.perf_counter() - began, "s")
    log.close()


def _timed(state: State, batch: Batch) -> float:
    began = time.perf_counter()
    _step(state, batch)
    wait(state.device)
    return time.perf_counter() - began


def _beside(seconds: list[float], step: float) -> float:
    """Median over a step; the first is left out where there are more: it meets the copy."""
    return statistics.median(seconds[1:] or seconds) / step
