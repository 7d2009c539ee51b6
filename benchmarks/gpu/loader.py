"""Batches from the shards to the device, drawn and normalized there, beside what the fastest step takes."""

import time
from itertools import islice

from benchmarks.gpu import abilities, training
from benchmarks.gpu.case import PARTICLES, Case, net_config
from benchmarks.gpu.report import Context, Report
from benchmarks.gpu.timing import Stopwatch, compilation, part, wait
from imm_scale.data.loader import Loader
from imm_scale.data.sample_order import Layout

FASTEST = "DiT-S/2"  # the net whose step takes the most samples a second


def run(context: Context, report: Report) -> None:
    batch = 2 * PARTICLES if context.small else 256
    batches = 4 if context.small else 64
    supply = _rate(context, batch, batches)
    report.figure(f"loader to device, batches of {batch}", supply, "samples/s")
    why_not = abilities.lacks_compiler(context)
    with compilation(context), part(report, FASTEST):
        case = Case(net_config(context, FASTEST), training.samples_of(context), "bf16", not why_not, context.device)
        (seconds,) = Stopwatch(context).medians(case.step, times=3)
        name = f"{FASTEST}, {'eager' if why_not else 'compiled'}"
        report.figure(f"what a step of {name} takes", case.samples / seconds, "samples/s")
        report.goal(f"loader over {name}", supply * seconds / case.samples, at_least=1.0)


def _rate(context: Context, batch: int, batches: int) -> float:
    """Samples per second, after as many batches again that fill what reads ahead."""
    layout = Layout(batch, PARTICLES, 1, batch)
    with Loader(training.manifest(context), layout, 0, 0, device=context.device) as loader:
        for _ in islice(loader, batches):
            pass
        wait(context.device)
        began = time.perf_counter()
        for _ in islice(loader, batches):
            pass
        wait(context.device)
        return batch * batches / (time.perf_counter() - began)
