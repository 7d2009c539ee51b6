"""The net's derivative along a tangent: exact in fp32, near in bf16, the same compiled; what it costs beside a forward.

The reference is forward-mode differentiation of the same net in fp64 on the CPU.
"""

import copy
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.gpu import abilities, problem
from benchmarks.gpu.case import make_net, net_config
from benchmarks.gpu.report import Context, Report
from benchmarks.gpu.timing import Budget, Stopwatch, part, wait
from imm_scale.models.base import Backbone
from imm_scale.models.dit import DiT
from imm_scale.precision import computing

_NET = "DiT-XL/2"
_SAMPLES = 16
_SECONDS = 12  # of the timings
# Rounding of every product to 2^-24 and 2^-9, over the layers of the small net; on a CPU 1e-6 and 8e-3.
_ERROR = {"fp32": 1e-5, "bf16": 3e-2}
_BIAS = 0.3  # standard deviation: a tangent taken carelessly drowns in it
Inputs = tuple[Tensor, ...]


def run(context: Context, report: Report) -> None:
    budget = Budget(context, "tangent")
    model = _biased(problem.net(context.small))
    inputs = _inputs(model, 8, torch.device("cpu"))
    reference = _reference(model, inputs)
    _errors(context, report, model, inputs, reference)
    if budget.allows(report, "timings", _SECONDS):
        with part(report, "timings"):
            _timings(context, report)


def _biased(model: DiT) -> DiT:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(_BIAS * torch.randn(parameter.shape, generator=generator))
    return model


def _inputs(model: DiT, samples: int, device: torch.device) -> Inputs:
    """x, dx, the two times with their rates at a time scale of 1, labels."""
    generator = torch.Generator().manual_seed(2)
    c = model.config
    shape = (samples, c.channels, c.height, c.image_width)
    x, dx = (torch.randn(shape, generator=generator) for _ in range(2))
    t = torch.rand(samples, generator=generator, dtype=torch.float64)
    one, label = torch.ones_like(t), torch.arange(samples) % c.num_classes
    return tuple(part.to(device) for part in (x, dx, t, one, 0.5 * t, one, label))


def _reference(model: DiT, inputs: Inputs) -> Tensor:
    """The derivative (N, C, H, W) in fp64."""
    exact = copy.deepcopy(model).double()
    x, dx, t, dt, second, dsecond, label = inputs
    return Backbone.with_tangent(exact, x.double(), dx.double(), t, dt, second, dsecond, label)[1].detach()


def _errors(context: Context, report: Report, model: DiT, inputs: Inputs, reference: Tensor) -> None:
    model = model.to(context.device)
    here = tuple(tensor.to(context.device) for tensor in inputs)
    x, _, t, _, second, _, label = here
    for precision, bound in _ERROR.items():
        missing = abilities.lacks_precision(context, precision)
        if missing:
            report.skip(precision, missing)
            continue
        with computing(precision, context.device):
            value, derivative = model.with_tangent(*here)
            plain = model(x, t, second, label)
        report.check(f"{precision}: derivative against fp64, relative", _apart(derivative, reference), at_most=bound)
        report.check(f"{precision}: value is that of forward, to the bit", torch.equal(value, plain), equals=True)
        _compiled(context, report, precision, model, here, reference)


def _apart(derivative: Tensor, reference: Tensor) -> float:
    return float((derivative.double().cpu() - reference).norm() / reference.norm())


def _compiled(context: Context, report: Report, precision: str, model: DiT, inputs: Inputs, reference: Tensor) -> None:
    if not abilities.compiles_afresh(context, report, precision):
        return
    compiled = copy.deepcopy(model)
    compiled.compile_blocks()
    with computing(precision, context.device):
        _, derivative = compiled.with_tangent(*inputs)
    error = _apart(derivative, reference)
    report.check(f"{precision}, compiled: derivative against fp64, relative", error, at_most=_ERROR[precision])
    report.check(f"{precision}, compiled: graph breaks", sum(counters["graph_break"].values()), at_most=0)


def _timings(context: Context, report: Report) -> None:
    """Eager, in bf16, of the value with gradient and the way back, without and with a derivative of all samples."""
    model = make_net(net_config(context, _NET), context.device)
    inputs = _inputs(model, 8 if context.small else _SAMPLES, context.device)
    x, _, t, _, second, _, label = inputs

    def forward() -> None:
        with computing("bf16", context.device), torch.no_grad():
            model(x, t, second, label)

    def step(tangent: bool) -> None:
        model.zero_grad(set_to_none=True)
        with computing("bf16", context.device):
            value = model.with_tangent(*inputs)[0] if tangent else model(x, t, second, label)
        value.float().sum().backward()

    watch = Stopwatch(context)
    alone, plain, tangent = watch(forward, lambda: step(False), lambda: step(True))
    name = f"{_NET}, {len(x)} samples"
    unit = statistics.median(alone)
    report.figure(f"{name}: forward", 1e3 * unit, "ms")
    report.figure(f"{name}: value and way back, in forwards", statistics.median(plain) / unit)
    report.figure(f"{name}: with a derivative of all samples, in forwards", statistics.median(tangent) / unit)
    if context.device.type == "cuda":
        without, with_it = (_peak(context, step, tangent) for tangent in (False, True))
        report.figure(f"{name}: peak memory with over without a derivative", with_it / without)
    else:
        report.skip(f"{name}: peak memory", "only a GPU counts what its allocator hands out")


def _peak(context: Context, step: Callable[[bool], None], tangent: bool) -> float:
    torch.cuda.reset_peak_memory_stats(context.device)
    step(tangent)
    wait(context.device)
    return float(torch.cuda.max_memory_allocated(context.device))
