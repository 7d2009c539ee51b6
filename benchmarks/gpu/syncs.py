"""What keeps the GPU waiting for its host in a step of training: synchronizations, launches, gaps between kernels."""

import contextlib
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu import abilities, trace, training
from benchmarks.gpu.case import Case, net_config
from benchmarks.gpu.report import Context, Report
from benchmarks.gpu.step import LARGEST
from benchmarks.gpu.timing import Budget, Stopwatch, compilation, part
from imm_scale.models.dit import DiTConfig

_WARNING = "synchronizing CUDA operation"  # of torch's warning
_STEPS = 6  # counted one by one; the last of them is logged
_TRACED = 3
_LONGEST, _NAME = 12, 90  # kernels named, characters of a name
_ROUNDS = 5
_AT_MOST = 1.0  # synchronizations of a step, aimed at
_AROUND = 150.0  # kernels of a micro-batch around the blocks, forward and backward, aimed at
_SECONDS_AROUND = 5  # to count them


def run(context: Context, report: Report) -> None:
    budget = Budget(context, "syncs")
    why_not = abilities.lacks_compiler(context)
    if why_not:
        report.skip("compiled", f"{why_not}: the steps below ran eagerly")
    samples = training.samples_of(context)
    overrides = (f"train.compile={not why_not}".lower(), f"train.log_every={2 * _STEPS}")
    settings = training.config(context, LARGEST, samples, *overrides)
    name = f"{LARGEST}, {samples} samples"
    with compilation(context), part(report, name), training.training_state(settings) as state:
        with training.loop_steps(state) as step:
            for _ in range(_STEPS):  # warm-up; the next record then falls on the last counted step
                step()
            _count(context, report, step)
            _trace(context, report, step)
            (whole,) = Stopwatch(context, _ROUNDS).medians(step, times=2)
        batch = training.random_batch(state.prepared.spec.net, samples, state.device)
        (engine,) = Stopwatch(context, _ROUNDS).medians(lambda: state.engine.step([batch], 1e-4), times=2)
        report.figure(f"{name}: step of the loop", 1e3 * whole, "ms")
        report.figure(f"{name}: step of the engine, optimizer included", 1e3 * engine, "ms")
        report.figure(f"{name}: loop over engine", whole / engine)
    if budget.allows(report, "kernels around the blocks", _SECONDS_AROUND):
        with compilation(context), part(report, "kernels around the blocks"):
            _around(context, report)


def _count(context: Context, report: Report, step: Callable[[], None]) -> None:
    """Torch's own count, a step at a time. It knows nothing of waits inside torch.distributed."""
    counts, places = [], Counter[str]()
    for _ in range(_STEPS):
        with counted(context.device) as by_line:
            step()
        counts.append(by_line.total())
        places = by_line if len(counts) < _STEPS else places
    if context.device.type == "cpu":
        report.skip("synchronizations of a step", "a CPU has none")
        return
    report.goal("synchronizations of a step", statistics.median(counts[:-1]), at_most=_AT_MOST)
    report.figure("synchronizations of a step that is logged", counts[-1])
    report.figure("where a step synchronizes", ", ".join(f"{place} x {n}" for place, n in places.items()) or "nowhere")


@contextlib.contextmanager
def counted(device: torch.device) -> Iterator[Counter[str]]:
    """Synchronizing operations, by the line of Python that ran them; filled on leaving. None on CPU."""
    by_line = Counter[str]()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with _sync_warnings(device):
            yield by_line
    for warning in heard:
        if _WARNING in str(warning.message):
            by_line[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextlib.contextmanager
def _sync_warnings(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _around(context: Context, report: Report) -> None:
    """What a micro-batch launches around the blocks, whose number does not grow with the depth."""
    config, samples = net_config(context, "DiT-S/2"), training.samples_of(context)
    one, two = (_launches(context, replace(config, depth=depth), samples) for depth in (1, 2))
    around = 2 * one - two
    if context.device.type == "cpu":
        report.figure("operators of a micro-batch around the blocks, views and nested ones too", around)
    else:
        report.goal("kernels and copies of a micro-batch around the blocks", around, at_most=_AROUND)


def _launches(context: Context, config: DiTConfig, samples: int) -> int:
    case = Case(config, samples, "bf16", compiled=False, device=context.device)
    for _ in range(2):
        case.step()
    recorded = trace.record(case.step, 1, context.device, context.out / f"trace-{config.depth}-blocks.json.gz")
    return recorded.kernels + recorded.copies


def _trace(context: Context, report: Report, step: Callable[[], None]) -> None:
    recorded = trace.record(step, _TRACED, context.device, context.out / "trace-step.json.gz")
    report.figure("kernels of a step", recorded.kernels / _TRACED)
    report.figure("copies and fills of a step", recorded.copies / _TRACED)
    waits = ", ".join(f"{name} x {n / _TRACED:g}" for name, n in recorded.waits.items())
    report.figure("the host's waits in a step, as CUDA's calls", waits or "none")
    report.figure("idle share of the device under the profiler", recorded.idle_share)
    longest = sorted(recorded.seconds.items(), key=lambda item: item[1], reverse=True)[:_LONGEST]
    total = sum(recorded.seconds.values())
    for place, (name, seconds) in enumerate(longest, start=1):
        share = f"{1e3 * seconds / _TRACED:.2f} ms, {seconds / total:.1%} of all: {name[:_NAME]}"
        report.figure(f"where a step's time on the device goes, {place}", share)
