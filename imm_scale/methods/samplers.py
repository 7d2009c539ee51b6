"""From noise to samples along a time grid (alg 4 and 5).

Every sampler takes the state x (N, ...) in fp64 at grid[0], the decreasing grid, labels (N,), the guidance, and
`noise`, which gives fresh N(0, sigma_d^2 I) of the shape of x for the i-th step of those samplers that add some.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imm_scale.errors import UserError
from imm_scale.methods.flow_map import VELOCITIES, FlowMap
from imm_scale.methods.probability_path import diffuse

Noise = Callable[[int], Tensor]
# Matrix products of other shapes round differently. So the net always sees this many samples, those whose index has
# the same quotient by it, and sample i is computed in one way only.
SAMPLES_PER_CALL = 64


@dataclass(frozen=True)
class Guidance:
    """Scale w, in force at times of (low, high]; outside them the net is evaluated once instead of twice."""

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def at(self, t: Tensor) -> float:
        """The scale at a scalar time."""
        return self.scale if self.low < float(t) <= self.high else 1.0

    @property
    def told(self) -> Tensor:
        """(1, 3) fp64, the same at all times, for a net that is told it and is evaluated once everywhere."""
        return torch.tensor([[1.0 - 1.0 / self.scale, self.low, self.high]], dtype=torch.float64)


NO_GUIDANCE = Guidance()


def _jump(flow_map: FlowMap, x: Tensor, s: Tensor, t: Tensor, label: Tensor, guidance: Guidance) -> Tensor:
    s, at = s[None].to(x.device), t[None].to(x.device)
    if flow_map.takes_guidance:
        return flow_map(x, s, at, label, guidance=guidance.told.to(x.device))
    return flow_map(x, s, at, label, guidance.at(t))


@torch.no_grad()
def pushforward(
    flow_map: FlowMap,
    x: Tensor,
    grid: Tensor,
    label: Tensor,
    guidance: Guidance = NO_GUIDANCE,
    noise: Noise | None = None,
) -> Tensor:
    """x <- f_{t_{i-1}, t_i}(x), (N, C, H, W), down the grid (steps + 1,) (alg 4).

    For a flow-matching net every step is a DDIM step, which for `euler_fm` is an Euler step.
    """
    for t, s in itertools.pairwise(grid):
        x = _jump(flow_map, x, s, t, label, guidance)
    return x


@torch.no_grad()
def restart(
    flow_map: FlowMap,
    x: Tensor,
    grid: Tensor,
    label: Tensor,
    guidance: Guidance = NO_GUIDANCE,
    noise: Noise | None = None,
) -> Tensor:
    """Jumps to the end of the grid (steps + 1,), adds fresh noise up to the next time, and jumps again (alg 5)."""
    assert noise is not None, "restart adds noise"
    for step, (t, s) in enumerate(itertools.pairwise(grid)):
        x = _jump(flow_map, x, grid[-1], t, label, guidance)
        if step < len(grid) - 2:
            x = diffuse(flow_map.interp, x, noise(step), s.to(x.device))
    return x


def pushforward_restart(
    flow_map: FlowMap,
    x: Tensor,
    grid: Tensor,
    label: Tensor,
    guidance: Guidance = NO_GUIDANCE,
    noise: Noise | None = None,
) -> Tensor:
    """The first half of the steps of the grid (steps + 1,), rounded up, by pushforward, the rest by restart."""
    middle = len(grid) // 2
    x = pushforward(flow_map, x, grid[: middle + 1], label, guidance)
    return restart(flow_map, x, grid[middle:], label, guidance, noise) if middle < len(grid) - 1 else x


def check(sampler: str, flow_map: FlowMap) -> None:
    """Raises UserError for a sampler that this map, whose weights are not looked at, cannot be drawn with."""
    if sampler == "heun" and (flow_map.parameterization not in VELOCITIES or flow_map.second_time != "none"):
        raise UserError(
            f"sampler=heun follows a velocity: it needs parameterization=euler_fm and second_time=none, not "
            f"{flow_map.parameterization} and {flow_map.second_time}; use sampler=pushforward"
        )


@torch.no_grad()
def heun(
    flow_map: FlowMap,
    x: Tensor,
    grid: Tensor,
    label: Tensor,
    guidance: Guidance = NO_GUIDANCE,
    noise: Noise | None = None,
) -> Tensor:
    """Heun's second-order steps of the probability flow down the grid (steps + 1,), the last one Euler's.

    That is 2 steps - 1 evaluations.

    Raises:
        UserError: a map that is no velocity field: Heun needs `euler_fm` (or `velocity`) and a net without second time.
    """
    check("heun", flow_map)
    steps = len(grid) - 1
    for step, (t, s) in enumerate(itertools.pairwise(grid)):
        euler = _jump(flow_map, x, s, t, label, guidance)
        if step == steps - 1:
            return euler
        # f is linear in its target, so the velocity at (euler, s) is that of a jump from there to the end.
        end = grid[-1]
        velocity = (euler - _jump(flow_map, euler, end, s, label, guidance)) / float(s - end)
        x = 0.5 * (x + euler - float(t - s) * velocity)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "pushforward": pushforward,
    "restart": restart,
    "pushforward_restart": pushforward_restart,
    "heun": heun,
}
