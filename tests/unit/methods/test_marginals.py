"""Training recovers distributions with a known answer: marginals, for a map need not be the probability flow's.

The V-statistic shrinks the spread, so one-step covariances may come out low by a few per cent.
"""

import copy
import math

import torch

from imm_scale import rng
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.methods.samplers import pushforward
from tests.unit.methods.mlp import Mlp
from tests.unit.methods.small import imm, losses, starting_noise

BATCH = 256


def _train(data, steps: int, k: int) -> FlowMap:
    torch.manual_seed(0)
    flow_map = FlowMap(Mlp(1000.0), OTFlowMatching(), "euler_fm", "s", 0.5)
    objective = imm(particles=4, t_min=0.0, t_max=0.994, k=k, label_drop=0.0)
    optimizer = torch.optim.Adam(flow_map.parameters(), lr=2e-3)
    average = copy.deepcopy(flow_map)
    label = torch.zeros(BATCH, dtype=torch.long)
    for step in range(steps):
        ordinal = torch.arange(step * BATCH, (step + 1) * BATCH)
        loss = losses(objective, flow_map, data(ordinal), label, ordinal, seed=1).loss_G.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(flow_map.parameters()), 0.005)
    return average.requires_grad_(False)


def _samples(flow_map: FlowMap, grid: list[float], num: int = 20_000) -> torch.Tensor:
    noise = starting_noise((2,), torch.arange(num), seed=5)
    return pushforward(flow_map, noise, torch.tensor(grid, dtype=torch.float64), torch.zeros(num, dtype=torch.long))


def test_a_gaussian_keeps_its_mean_and_covariance_in_one_step():
    mean = torch.tensor([0.2, -0.1])
    root = torch.tensor([[0.5, 0.0], [0.1, 0.45]])

    def data(ordinal):
        return mean + rng.normal(2, "data", ordinal, (2,)) @ root.T

    z = _samples(_train(data, 2500, k=11), [0.994, 0.0])
    expected = (root @ root.T).double()
    # Sampling error at 20,000 samples: 1 % of a variance, 0.004 of a mean. The rest is a small net and the V-statistic.
    torch.testing.assert_close(z.mean(0), mean.double(), rtol=0, atol=0.03)
    ratio = torch.linalg.eigvalsh(torch.cov(z.T)) / torch.linalg.eigvalsh(expected)
    assert ratio.min() > 0.90, ratio
    assert ratio.max() < 1.05, ratio


def test_a_ring_of_eight_keeps_all_its_modes_in_two_steps():
    angles = torch.arange(8) * (2 * math.pi / 8)
    centres = 0.7 * torch.stack([angles.cos(), angles.sin()], dim=1)  # mean square 0.25 a coordinate

    def data(ordinal):
        mode = (rng.uniform(3, "mode", ordinal)[:, 0] * 8).long()
        return centres[mode] + 0.05 * rng.normal(3, "data", ordinal, (2,))

    z = _samples(_train(data, 3000, k=10), [0.994, 0.5833, 0.0])
    distance = torch.cdist(z.float(), centres)
    nearest, mode = distance.min(dim=1)
    weights = torch.bincount(mode[nearest < 0.2], minlength=8) / len(z) * 8
    assert weights.min() > 0.8, weights
    assert weights.max() < 1.2, weights
