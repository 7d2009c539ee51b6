"""What torch's profiler saw: kernels, the host's calls that wait for the device, and how long the device was idle."""

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.timing import Action, wait

Event = Mapping[str, Any]
Interval = tuple[float, float]
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_CALLS = {"cuda_runtime", "cuda_driver"}
_WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize"}


class Trace:
    """Events of a Chrome trace that have a duration.

    Attributes:
        kernels: on the device; on CPU, where there are none, the operators.
        waits: the host's calls that waited for the device, by name.
        seconds: on the device, by the name of the kernel, copy or fill.
    """

    def __init__(self, events: Iterable[Event], on_cpu: bool = False):
        complete = [event for event in events if event.get("ph") == "X"]
        categories = {"cpu_op"} if on_cpu else _ON_DEVICE
        busy = [event for event in complete if event.get("cat") in categories]
        self.intervals: list[Interval] = [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in busy]
        self.kernels = sum(event["cat"] in ("kernel", "cpu_op") for event in busy)
        self.copies = len(busy) - self.kernels
        self.waits = Counter(e["name"] for e in complete if e.get("cat") in _CALLS and e["name"] in _WAITS)
        self.seconds: dict[str, float] = {}
        for event in busy:
            self.seconds[event["name"]] = self.seconds.get(event["name"], 0.0) + 1e-6 * float(event["dur"])

    @property
    def idle_share(self) -> float:
        """Of the time from the first kernel's beginning to the last one's end."""
        if not self.intervals:
            return 0.0
        span = max(end for _, end in self.intervals) - min(begin for begin, _ in self.intervals)
        return 1.0 - covered(self.intervals) / span


def covered(intervals: Sequence[Interval]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def record(action: Action, times: int, device: torch.device, path: Path) -> Trace:
    """Runs an action so often under the profiler; the trace stays at `path`, a .json.gz for Perfetto."""
    on_cpu = device.type == "cpu"
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU] if on_cpu else [kind.CPU, kind.CUDA]) as profile:
        for _ in range(times):
            action()
        wait(device)
    profile.export_chrome_trace(str(path))
    return Trace(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"], on_cpu)
