"""Sampling by the program's own drawer: images a second in each precision, eager and compiled, and what each costs.

Rates and errors are of nets with random weights; whether a precision shows in samples, the demo's trained net tells.
"""

import copy
from dataclasses import dataclass, replace

from torch import Tensor

from benchmarks import sampling as demo
from benchmarks.gpu import training
from benchmarks.gpu.case import make_net, net_config
from benchmarks.gpu.report import Context, Report
from benchmarks.gpu.step import LARGEST
from benchmarks.gpu.timing import Budget, Stopwatch, compilation, part
from imm_scale import build
from imm_scale.build import ModelSpec
from imm_scale.data.manifest import Manifest
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.methods.samplers import SAMPLES_PER_CALL
from imm_scale.sampling.draw import Drawer, SamplingPlan

SMALLEST = "DiT-S/2"
STEPS = (1, 4)
_SLOW, _FAST = ("fp32", False), ("bf16", True)  # precision and whether compiled
WAYS = (_SLOW, _FAST, ("bf16", False), ("tf32", False), ("tf32", True), ("fp32", True))
_ROUNDS = 2
_SECONDS = 6  # of a way, or of the demo's net, compilation included
_DEMO = "Frechet distance of the demo's net"
_AT_LEAST = 8.0  # rate of the largest net the fast way over the slow one, aimed at


@dataclass(frozen=True)
class Model:
    """A net to draw from, and its samples in fp64 by step count."""

    spec: ModelSpec
    flow_map: FlowMap
    exact: dict[int, Tensor]

    def plan(self, steps: int, precision: str = "fp32", compiled: bool = False) -> SamplingPlan:
        """One call of the net a step."""
        labels = tuple(range(self.spec.net.num_classes))
        return SamplingPlan(steps, labels=labels, num=SAMPLES_PER_CALL, precision=precision, compile=compiled)


def run(context: Context, report: Report) -> None:
    budget = Budget(context, "sampling")
    with compilation(context):
        with part(report, LARGEST):
            _measure(context, report, budget, LARGEST)
        if budget.allows(report, _DEMO, _SECONDS):
            with part(report, _DEMO):
                _compare_distances(context, report)
        with part(report, SMALLEST):
            _measure(context, report, budget, SMALLEST)


def random_model(context: Context, size: str) -> Model:
    """A net of that size with random weights, none of them zero."""
    config = training.config(context, size, SAMPLES_PER_CALL)
    spec = build.model_spec(config, Manifest.load(training.manifest(context)))
    net = make_net(net_config(context, size), context.device)
    flow_map = FlowMap(net, OTFlowMatching(), null_label=net.null_label).eval().requires_grad_(False)
    model = Model(spec, flow_map, {})
    reference = copy.deepcopy(flow_map).double()  # on the device: a CPU would take minutes over the largest net
    return replace(model, exact={steps: demo.draw(reference, spec, model.plan(steps)) for steps in STEPS})


def _measure(context: Context, report: Report, budget: Budget, size: str) -> None:
    model, rates = random_model(context, size), {}
    for precision, compiled in WAYS:
        name = f"{size}, {demo.label(precision, compiled)}"
        missing = demo.possible(precision, compiled)
        if missing:
            report.skip(name, missing)
        if missing or not budget.allows(report, name, _SECONDS):
            continue
        rates[precision, compiled] = [
            _rate(context, report, model, name, model.plan(steps, precision, compiled)) for steps in STEPS
        ]
        if (precision, compiled) == _FAST and size == LARGEST:
            for steps, fast, slow in zip(STEPS, rates[_FAST], rates[_SLOW], strict=True):
                report.goal(f"{name} over fp32 eager, {steps} steps", fast / slow, at_least=_AT_LEAST)


def _rate(context: Context, report: Report, model: Model, name: str, plan: SamplingPlan) -> float:
    error = demo.error_against_fp64(model.flow_map, model.spec, plan, model.exact[plan.steps])
    report.figure(f"{name}, {plan.steps} steps: error against fp64", error.mean)
    drawer = Drawer(model.flow_map, model.spec, plan)
    (seconds,) = Stopwatch(context, _ROUNDS, warm_ups=1).medians(lambda: drawer.draw(0, plan.num))
    report.figure(f"{name}, {plan.steps} steps", plan.num / seconds, "images/s")
    return plan.num / seconds


def _compare_distances(context: Context, report: Report) -> None:
    """The Frechet distance of the demo's digits, the fast way and the slow one."""
    missing = demo.possible(*_FAST)
    if missing:
        report.skip(_DEMO, missing)
        return
    try:
        spec, flow_map = demo.load(device=context.device)
        reference = demo.digits(spec)
    except ImportError:
        report.skip(_DEMO, "scikit-learn, which holds the digits, is not installed")
        return
    num, repeats = (SAMPLES_PER_CALL, 2) if context.small else (demo.DIGITS, 5)
    for steps in STEPS:
        slow, fast = (
            demo.frechet(flow_map, spec, replace(demo.plan(spec, steps, *way), num=num), reference, repeats)
            for way in (_SLOW, _FAST)
        )
        name = f"{_DEMO}, {steps} steps"
        report.figure(f"{name}, {demo.label(*_SLOW)}", slow.mean)
        report.figure(f"{name}, {demo.label(*_FAST)}", fast.mean)
        report.goal(f"{name}: how far apart", abs(fast.mean - slow.mean), at_most=slow.std)
