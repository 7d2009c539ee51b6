"""Times of actions, taken in turn so that a slow moment of the machine meets all of them."""

import contextlib
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.gpu.report import Context, Report

Action = Callable[[], object]
CPU = torch.device("cpu")
_WARM_UPS = 3  # compilation, cuBLAS's and cuDNN's choices, the allocator's blocks


def wait(device: torch.device) -> None:
    """Until everything launched on it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(
    actions: Sequence[Action], rounds: int, device: torch.device = CPU, times: int = 1, warm_ups: int = 1
) -> list[list[float]]:
    """Seconds of each action, a value a round, over which the actions take turns.

    Args:
        times: how often an action runs before the device is waited for; the mean counts. More than once for what is so
            short that the wait itself, some 10 us, would show.
        warm_ups: runs of each action that are not counted.
    """
    per_action: list[list[float]] = [[] for _ in actions]
    for action in actions:
        for _ in range(warm_ups):
            action()
    for _ in range(rounds):
        for action, values in zip(actions, per_action, strict=True):
            values.append(_mean_seconds(action, times, device))
    return per_action


def _mean_seconds(action: Action, times: int, device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    for _ in range(times):
        action()
    wait(device)
    return (time.perf_counter() - began) / times


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


class Stopwatch:
    """`seconds` with as many rounds as the size asks for: one at `small`, where figures mean nothing."""

    def __init__(self, context: Context, rounds: int = 7, warm_ups: int = _WARM_UPS):
        self._device = context.device
        self._rounds, self._warm_ups = (1, 1) if context.small else (rounds, warm_ups)

    def __call__(self, *actions: Action, times: int = 1) -> list[list[float]]:
        return seconds(actions, self._rounds, self._device, 1 if self._device.type == "cpu" else times, self._warm_ups)

    def medians(self, *actions: Action, times: int = 1) -> list[float]:
        """Median seconds of each."""
        return [statistics.median(values) for values in self(*actions, times=times)]


class Budget:
    """What is left of a section's limit: what would not fit is skipped, so that the section comes to its end.

    Made when the section begins.
    """

    def __init__(self, context: Context, section: str):
        from benchmarks.gpu.sections import limit_of

        self._end = math.inf if context.small else time.monotonic() + context.slack * limit_of(section)

    def allows(self, report: Report, name: str, seconds: float) -> bool:
        """Whether something that takes about so many seconds at full size still fits; says so where it does not."""
        left = self._end - time.monotonic()
        if left < seconds:
            report.skip(name, f"takes some {seconds:g} s, and {max(left, 0.0):.0f} s of the section's limit are left")
        return left >= seconds


@contextlib.contextmanager
def compilation(context: Context) -> Iterator[None]:
    """Compiled graphs of all sections in one cache; at size `small` what is compiled runs eagerly, to save the time."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(context.out.resolve() / "inductor"))
    with torch.compiler.set_stance("force_eager" if context.small else "default"):
        yield


@contextlib.contextmanager
def part(report: Report, name: str) -> Iterator[None]:
    """A part of a section, with graphs and memory of its own: skipped where it does not fit the device's memory.

    What it makes belongs into a function of its own, or it lives on beside the next part.
    """
    torch.compiler.reset()  # a block's code keeps 8 graphs at most, of all nets together, and runs eagerly then
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        yield
    except torch.OutOfMemoryError as error:
        report.skip(name, f"too little memory: {str(error).partition('. GPU')[0]}")


def extra_memory(action: Action, device: torch.device) -> int:
    """Bytes that a GPU's allocator hands out at most while an action runs, beyond those there were."""
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    action()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before
