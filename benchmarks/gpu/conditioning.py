"""Under tf32 the net tells t from r(s, t) as it does in fp64."""

import copy

import torch
from torch import Tensor

from benchmarks.gpu import abilities, problem
from benchmarks.gpu.report import Context, Report
from imm_scale.methods import imm_times
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.models.layers import TimeEmbedder

_K = 12  # as published, with no least gap between t and r
# Matrix units read 10 bits of a weight's mantissa and drop the rest: 2^-10 of it. Two layers of weights lie between a
# time and its embedding, and the slope of the SiLU in between moves by as little. Inputs rounded alike would cost 1 %
# of the difference at t = 0.95, a third of it at 0.99.
_TF32 = 2 * 2 * 2.0**-10
_FP32_TIMES = 2.0  # what fp32 does to the difference comes on top, twice for an input in two parts


def run(context: Context, report: Report) -> None:
    embedder = problem.net(context.small).t_embedder
    exact = copy.deepcopy(embedder).double()
    embedder.to(context.device)
    missing = abilities.lacks_precision(context, "tf32")
    if missing:
        report.skip("rounding of products to tf32", missing)
    else:
        report.check("products are rounded to tf32, relative", _rounding(context.device), at_least=1e-5)
    for t in (0.5, 0.95, 0.98, 0.99):
        expected = _difference(exact, t, torch.device("cpu"))
        in_fp32, in_tf32 = (_error(embedder, t, context.device, expected, allowed) for allowed in (False, True))
        report.figure(f"embedding of t less that of r at t = {t:g}, relative error in fp32", in_fp32)
        bound = _TF32 + _FP32_TIMES * in_fp32
        report.check(f"embedding of t less that of r at t = {t:g}, relative error in tf32", in_tf32, at_most=bound)


def _error(embedder: TimeEmbedder, t: float, device: torch.device, expected: Tensor, tf32: bool) -> float:
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return float((_difference(embedder, t, device) - expected).norm() / expected.norm())


@torch.no_grad()
def _difference(embedder: TimeEmbedder, t: float, device: torch.device) -> Tensor:
    """(64, D) fp64 on the CPU: embeddings of times about t less those of their r, for s = 0."""
    t_G = torch.linspace(t - 0.003, t + 0.003, 64, dtype=torch.float64)
    r_G = imm_times.map_r(OTFlowMatching(), torch.zeros_like(t_G), t_G, _K)
    at_t, at_r = embedder(1000.0 * torch.cat([t_G, r_G]).to(device)).double().cpu().chunk(2)
    return at_t - at_r


def _rounding(device: torch.device) -> float:
    """Of an ordinary product, whose relative error in fp32 is about 1e-7."""
    torch.backends.cuda.matmul.allow_tf32 = True
    a, b = torch.randn(2, 512, 512, device=device)
    exact = a.double() @ b.double()
    return float((a @ b - exact).norm() / exact.norm())
