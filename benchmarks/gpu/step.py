"""A training step: milliseconds, its share of the arithmetic the card could do, what it costs beyond its passes."""

import statistics

from benchmarks.gpu import abilities
from benchmarks.gpu.case import Case, matmul, matmul_flops, net_config
from benchmarks.gpu.peak import data_sheet_of
from benchmarks.gpu.report import Context, Report
from benchmarks.gpu.timing import Budget, Stopwatch, compilation, part, ratios

LARGEST = "DiT-XL/2"
# Size of net and samples of a micro-batch, in order of worth.
CASES = ((LARGEST, 64), (LARGEST, 8), ("DiT-S/2", 64), ("DiT-L/2", 64), ("DiT-B/2", 64))
_SECONDS = 14  # of a case, compilation included
UTILIZATION, OVER_PASSES = 0.5, 1.03  # what is aimed at, at the largest net with 64 samples


def run(context: Context, report: Report) -> None:
    why_not = abilities.lacks_compiler(context)
    if why_not:
        report.skip("compiled", f"{why_not}: the steps below ran eagerly")
    budget = Budget(context, "step")
    with compilation(context):
        for size, samples in CASES[: 2 if context.small else None]:
            name = f"{size}, {samples} samples"
            if budget.allows(report, name, _SECONDS):
                with part(report, name):
                    _measure(context, report, size, samples, compiled=not why_not)


def _measure(context: Context, report: Report, size: str, samples: int, compiled: bool) -> None:
    name, aims = f"{size}, {samples} samples", (size, samples) == CASES[0]
    case = Case(net_config(context, size), 8 if context.small else samples, "bf16", compiled, context.device)
    watch, side = Stopwatch(context), 256 if context.small else 8192
    step, pair, product = watch(case.step, case.pair, matmul("bf16", side, context.device))
    report.figure(f"{name}: step", 1e3 * statistics.median(step), "ms")
    report.figure(f"{name}: rate", case.samples / statistics.median(step), "samples/s")
    rate = matmul_flops(side) / statistics.median(product)
    report.figure(f"{name}: random matmul of {side} beside it", rate / 1e12, "TFLOP/s")
    used = case.step_flops / statistics.median(step)
    report.figure(f"{name}: utilization of that matmul", used / rate)
    _against_data_sheet(context, report, name, used, aims)
    report.figure(f"{name}: step over its passes, run together as in a step", statistics.median(ratios(step, pair)))
    if aims:
        step, passes = watch(case.step, case.passes)
        over = statistics.median(ratios(step, passes))
        report.goal(f"{name}: step over its three passes", over, at_most=OVER_PASSES)
    _shares(report, watch, case, name, statistics.median(step))


def _against_data_sheet(context: Context, report: Report, name: str, flops: float, aims: bool) -> None:
    sheet = data_sheet_of(context.device)
    if sheet is None:
        report.skip(f"{name}: utilization of the data sheet", "no row for this device in imm_scale/planner/hardware.py")
        return
    name, share = f"{name}: utilization of {sheet.name}'s data sheet", flops / sheet.half
    if aims:
        report.goal(name, share, at_least=UTILIZATION)
    else:
        report.figure(name, share)


def _shares(report: Report, watch: Stopwatch, case: Case, name: str, step: float) -> None:
    """What the parts around the network take, each run alone. Launched alone they cannot hide behind the network."""
    draws, loss = watch.medians(case.draws, case.loss_only)
    report.figure(f"{name}: draws over step", draws / step)
    report.figure(f"{name}: loss over step", loss / step)
