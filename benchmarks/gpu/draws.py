"""Draws on the device are those on the CPU: words and uniforms bit for bit, normals but for rare ties of rounding."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu import abilities
from benchmarks.gpu.problem import methods
from benchmarks.gpu.report import Context, Report
from imm_scale import rng
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.imm import InductiveMomentMatching

Draw = Callable[[Tensor], Tensor]
_SEED = 7
# log, cos and sin err by up to 2 units in the last place of fp64 on a GPU and 1 on a CPU, so a normal by some 8 of them
# in all. That crosses a tie between two neighbouring fp32 once in 2^29 / 16 draws or so, 3e-8, and lands on the other.
_TIES = 1e-6
# The map r(s, t) is a handful of operations in fp64, each within half a unit in the last place, its tangents within 2.
_TIMES = 16 * 2.0**-53


def run(context: Context, report: Report) -> None:
    shape = (4, 32, 32) if not context.small else (2, 8, 8)
    ordinals = _ordinals(64 if context.small else 512)
    exact: dict[str, Draw] = {
        "words": _words,
        "bits": lambda n: rng.random_bits(_SEED, "dropout", n, stream=3),
        "uniforms": lambda n: rng.uniform(_SEED, "times", n, 101),
    }
    for way, through in _ways(context, report).items():
        for name, draw in exact.items():
            differing = _differing(through(draw), draw, ordinals, context.device)
            report.check(f"{name}, {way}: of {differing[1]} that differ", differing[0], at_most=0)
        _normals(report, way, through(lambda n: rng.normal(_SEED, "noise", n, shape)), shape, ordinals, context.device)
    _times(context, report, ordinals)


def _ordinals(count: int) -> Tensor:
    """Small ones, ones about 2^32, where the counter's second word begins, and large ones."""
    return torch.cat([torch.arange(count) + start for start in (0, 2**32 - count // 2, 2**41)])


def _ways(context: Context, report: Report) -> dict[str, Callable[[Draw], Draw]]:
    ways: dict[str, Callable[[Draw], Draw]] = {"eager": lambda draw: draw}
    missing = abilities.lacks_compiler(context)
    if missing:
        report.skip("draws, compiled", missing)
    else:
        ways["compiled"] = torch.compile
    return ways


def _words(ordinal_N: Tensor) -> Tensor:
    word = ordinal_N & 0xFFFFFFFF
    return torch.stack(rng.philox4x32((word, word + 1 & 0xFFFFFFFF, word ^ 0x55555555, ordinal_N >> 32), (123, 2**31)))


def _differing(there: Draw, here: Draw, ordinals: Tensor, device: torch.device) -> tuple[int, int]:
    """How many values differ between the device and eager draws on the CPU, of how many."""
    expected, actual = here(ordinals), there(ordinals.to(device)).cpu()
    assert expected.dtype == actual.dtype and expected.shape == actual.shape
    return int((expected != actual).sum()), expected.numel()


def _normals(
    report: Report, way: str, draw: Draw, shape: tuple[int, ...], ordinals: Tensor, device: torch.device
) -> None:
    expected, actual = rng.normal(_SEED, "noise", ordinals, shape), draw(ordinals.to(device)).cpu()
    apart = (_place(expected) - _place(actual)).abs()
    report.figure(f"normals, {way}: of {apart.numel()} that differ", int((apart > 0).sum()))
    report.check(f"normals, {way}: share that differs", float((apart > 0).double().mean()), at_most=_TIES)
    report.check(f"normals, {way}: largest distance", int(apart.max()), at_most=1, unit="ulp")


def _place(values: Tensor) -> Tensor:
    """The place of each fp32 among all of them in order, so that neighbours differ by 1."""
    bits = values.float().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _times(context: Context, report: Report, ordinals: Tensor) -> None:
    for name, flow_map, method in methods(torch.nn.Identity()):
        if isinstance(method, InductiveMomentMatching):
            apart = _times_apart(method, flow_map, ordinals, context.device)
            report.check(f"(s, r, t) of {name}: largest difference", apart, at_most=_TIMES)


def _times_apart(method: InductiveMomentMatching, flow_map: FlowMap, groups: Tensor, device: torch.device) -> float:
    here = torch.stack(method.draw_times(flow_map, groups, _SEED))
    there = torch.stack(method.draw_times(flow_map, groups.to(device), _SEED))
    return float((here - there.cpu()).abs().max())
