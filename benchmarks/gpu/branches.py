"""The pair of passes under 16-bit autocast: every gradient is there, the same without autocast's cache, and compiled
blocks are compiled once."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.gpu import abilities, problem
from benchmarks.gpu.report import Context, Report
from imm_scale.data.batch import Batch
from imm_scale.methods.base import FlowMapMethod
from imm_scale.methods.flow_map import FlowMap
from imm_scale.models.dit import DiT

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST_SEED = 10  # the compiler has graphs of their own for the integers 0 and 1
_SCALE = 2.0**12  # keeps fp16 gradients out of underflow
_K, _MIN_GAP = 6, 1e-4  # a step from t to r long enough that rounding a product moves the gradient by about as much
# On a GPU attention's backward pass sums in an order of its own at each call, and rounds what comes out; a weight whose
# cast was lost would cost a good part of the gradient.
_SAME = 5e-3
# Rounding every product, 2^-9 and 2^-12, moves this gradient by 4e-3 and 5e-4 (fp32 against autocast on a CPU); kernels
# that round elsewhere move it by about as much, in a deeper net by a little more.
_OTHER_KERNELS = {"bf16": 3e-2, "fp16": 4e-3}


@dataclass
class _Case:
    model: DiT
    flow_map: FlowMap
    method: FlowMapMethod
    batch: Batch
    dtype: torch.dtype

    def gradients(self, cached: bool = True, seed: int = _FIRST_SEED) -> dict[str, Tensor | None]:
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.batch.x.device.type, self.dtype, cache_enabled=cached):
            loss = self.method.loss(self.flow_map, self.batch, seed).loss_G.mean()
        (loss * _SCALE).backward()
        return {name: parameter.grad for name, parameter in self.model.named_parameters()}


def run(context: Context, report: Report) -> None:
    for precision, dtype in _DTYPES.items():
        missing = abilities.lacks_precision(context, precision)
        if missing:
            report.skip(precision, missing)
            continue
        case = _case(context, dtype)
        eager = case.gradients()
        _complete(report, precision, eager)
        report.check(
            f"{precision}: gradient without autocast's cache, relative",
            _apart(case.gradients(cached=False), eager),
            at_most=_SAME,
        )
        _compiled(context, report, precision, case, eager)


def _case(context: Context, dtype: torch.dtype) -> _Case:
    model = problem.net(context.small).to(context.device)
    _, flow_map, method = next(problem.methods(model, _K, _MIN_GAP))
    return _Case(model, flow_map, method, problem.samples(model, 16, context.device), dtype)


def _complete(report: Report, precision: str, gradients: dict[str, Tensor | None]) -> None:
    present = [gradient for gradient in gradients.values() if gradient is not None]
    report.check(f"{precision}: parameters without a gradient", len(gradients) - len(present), at_most=0)
    zero = sum(not bool(gradient.any()) for gradient in present)
    report.check(f"{precision}: parameters whose gradient is all zeros", zero, at_most=0)
    infinite = sum(not bool(gradient.isfinite().all()) for gradient in present)
    report.check(f"{precision}: parameters whose gradient is not finite", infinite, at_most=0)


def _apart(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> float:
    """Relative distance of two gradients."""
    difference = [float((_whole(actual[name]) - _whole(expected[name])).norm()) for name in expected]
    norm = [float(_whole(gradient).norm()) for gradient in expected.values()]
    return float(torch.tensor(difference).norm() / torch.tensor(norm).norm())


def _whole(gradient: Tensor | None) -> Tensor:
    """One that is missing counts as 0."""
    return torch.zeros((), dtype=torch.float64) if gradient is None else gradient.double()


def _compiled(context: Context, report: Report, precision: str, case: _Case, eager: dict[str, Tensor | None]) -> None:
    if not abilities.compiles_afresh(context, report, precision):
        return
    case.model.compile_blocks()
    compiled = case.gradients()
    _complete(report, f"{precision}, compiled", compiled)
    apart = _apart(compiled, eager)
    report.check(f"{precision}, compiled: gradient against eager, relative", apart, at_most=_OTHER_KERNELS[precision])
    case.gradients(seed=_FIRST_SEED + 1)
    after_two = counters["stats"]["unique_graphs"]
    for seed in range(_FIRST_SEED + 2, _FIRST_SEED + 5):
        case.gradients(seed=seed)
    report.figure(f"{precision}, compiled: graphs", after_two)
    report.check(f"{precision}, compiled: graphs were made", after_two, at_least=1)
    more = counters["stats"]["unique_graphs"] - after_two
    report.check(f"{precision}, compiled: graphs after the second step", more, at_most=0)
    report.check(f"{precision}, compiled: graph breaks", sum(counters["graph_break"].values()), at_most=0)
