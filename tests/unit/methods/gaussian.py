"""The flow map of Gaussian data in closed form, and random nets to compare losses on."""

import torch

from imm_scale import rng
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.models.base import Backbone
from imm_scale.models.dit import DiT, DiTConfig

from .small import SIGMA_D, losses

OT = OTFlowMatching()
MU, STD = 0.3, 0.7  # of the data: x ~ N(MU, STD^2)


def variance(u):
    return (1 - u) ** 2 * STD**2 + u**2 * SIGMA_D**2


def marginal_velocity(x, t):
    slope = -2 * (1 - t) * STD**2 + 2 * t * SIGMA_D**2
    return -MU + slope / (2 * variance(t)) * (x - (1 - t) * MU)


class Exact(Backbone):
    """G of the true flow map of Gaussian data on straight lines, told s; times are not scaled."""

    def __init__(self, parameterization="euler_fm"):
        super().__init__()
        self.parameterization = parameterization

    def forward(self, scaled, c_noise, second, label, dropout_key=None):
        s, t = second[:, None], c_noise[:, None]
        x = scaled * SIGMA_D * torch.hypot(1 - t, t)
        there = (1 - s) * MU + torch.sqrt(variance(s) / variance(t)) * (x - (1 - t) * MU)
        equal = s == t
        average = torch.where(equal, marginal_velocity(x, t), (x - there) / torch.where(equal, 1.0, t - s))
        return average / SIGMA_D


def exact_map():
    return FlowMap(Exact(), OT, "euler_fm", "s", SIGMA_D, time_scale=1.0)


def on_path(n, s, t, seed=0):
    """x, eps (n, 1) and both times (n,), fp64."""
    ordinal = torch.arange(n)
    x = MU + STD * rng.normal(seed, "data", ordinal, (1,)).double()
    eps = SIGMA_D * rng.normal(seed, "prior", ordinal, (1,)).double()
    return x, eps, torch.full((n,), s, dtype=torch.float64), torch.full((n,), t, dtype=torch.float64)


def labels(n):
    return torch.zeros(n, dtype=torch.int64)


def random_map(path=OT, parameterization="euler_fm", second="t_minus_s", dtype=torch.float64, zero_output=False, **net):
    fields = {"width": 16, "depth": 1, "heads": 2, "patch_size": 2, "channels": 2, "height": 4, "image_width": 4}
    model, generator = DiT(DiTConfig(**{**fields, "num_classes": 3, **net})), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        if zero_output:
            model.final_layer.linear.weight.zero_()
            model.final_layer.linear.bias.zero_()
    return FlowMap(model.to(dtype), path, parameterization, second, SIGMA_D, 1.0, null_label=3)


def batch(n=16, std=SIGMA_D):
    ordinal = torch.arange(n)
    return std * rng.normal(5, "x", ordinal, (2, 4, 4)).double(), ordinal % 3, ordinal


def gradient(method, flow_map, data):
    loss = losses(method, flow_map, *data, seed=7).loss_G.sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(flow_map.parameters()))])
