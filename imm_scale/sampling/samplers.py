"""From noise to samples along a time grid."""

import itertools

import torch
from torch import Tensor

from imm_scale import rng
from imm_scale.flow_map import FlowMap


def starting_noise(flow_map: FlowMap, shape: tuple[int, ...], index: Tensor, seed: int) -> Tensor:
    """x_N ~ N(0, sigma_d^2 I), fp64, (N, *shape): a function of the seed and each sample's index alone."""
    return flow_map.sigma_data * rng.normal(seed, "sample", index, shape).double()


@torch.no_grad()
def pushforward(flow_map: FlowMap, x: Tensor, grid: Tensor, label: Tensor, guidance_scale: float = 1.0) -> Tensor:
    """x <- f_{t_{i-1}, t_i}(x) down the grid (alg 4), in fp64.

    For a flow-matching net (`euler_fm`, no second time) every such step is an Euler step.

    Args:
        x: (N, ...) fp64 noise at grid[0].
        grid: decreasing times, fp64.
        label: (N,) classes.
    """
    for t, s in itertools.pairwise(grid):
        x = flow_map(x, s[None].to(x.device), t[None].to(x.device), label, guidance_scale)
    return x
