"""Flow matching, the baseline: its regression, and the closed forms of Gaussian data (imm.md section 4)."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import OTFlowMatching, VPCosine
from imm_scale.methods.samplers import pushforward
from imm_scale.models.base import Backbone
from tests.unit.methods.small import flow_matching, losses

OT, COSINE = OTFlowMatching(), VPCosine()
SIGMA_D = 0.5
BASE = flow_matching(t_min=0.0, t_max=1.0, label_drop=0.0)


class Net(Backbone):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, -0.2], dtype=torch.float64))
        self.calls = []

    def forward(self, x, c_noise, second, label, dropout_key=None):
        self.calls.append((x.detach(), c_noise, second, label, dropout_key))
        return self.w[0] * torch.tanh(x) + self.w[1] * torch.cos(c_noise / 1000).view(-1, *[1] * (x.dim() - 1))


def clean(n, shape=(2, 3, 3)):
    return SIGMA_D * torch.randn(n, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


LEGAL = [(OT, "euler_fm"), (OT, "simple_edm"), (OT, "identity"), (COSINE, "simple_edm"), (COSINE, "identity")]


@pytest.mark.parametrize(("interp", "parameterization"), LEGAL, ids=[f"{i.name}-{p}" for i, p in LEGAL])
def test_loss_is_the_mean_squared_error_of_what_makes_f_exact(interp, parameterization):
    net = Net()
    x, n = clean(8), 8
    group_losses = losses(
        BASE, FlowMap(net, interp, parameterization, "none"), x, torch.arange(n), torch.arange(n), seed=1
    )
    assert len(net.calls) == 1, "one pass"
    inputs, c_noise, second, _, _ = net.calls[0]
    assert second is None
    for i in range(n):
        t = c_noise[i].item() / 1000
        alpha, sigma = (1 - t, t) if interp is OT else (math.cos(math.pi * t / 2), math.sin(math.pi * t / 2))
        norm = math.hypot(alpha, sigma)
        clean_i = x[i].numpy()
        x_t = inputs[i].numpy() * SIGMA_D * norm
        eps = (x_t - alpha * clean_i) / sigma
        target = {
            "euler_fm": (eps - clean_i) / SIGMA_D,
            "simple_edm": (alpha * eps - sigma * clean_i) / (SIGMA_D * norm),
            "identity": clean_i,
        }[parameterization]
        out = 0.7 * np.tanh(inputs[i].numpy()) - 0.2 * math.cos(t)
        # eps is read back from x_t at an error of 1e-16 / sigma
        assert group_losses.loss_G[i].item() == pytest.approx(((out - target) ** 2).mean(), rel=1e-11)
        assert group_losses.t_G[i].item() == pytest.approx(t, rel=1e-15)


def test_each_sample_has_its_own_time_uniform_in_the_range():
    n = 20_000
    objective = flow_matching(t_min=0.1, t_max=0.9, label_drop=0.0)
    x = torch.zeros(n, 1, dtype=torch.float64)
    t = losses(objective, FlowMap(Net(), OT, "euler_fm", "none"), x, torch.zeros(n), torch.arange(n), 0).t_G
    ranks = torch.arange(1, n + 1, dtype=torch.float64) / n
    # Kolmogorov and Smirnov at p = 1e-3
    assert (((t - 0.1) / 0.8).sort().values - ranks).abs().max() < 1.95 / math.sqrt(n) + 1 / n
    assert t.min() >= 0.1
    assert t.max() <= 0.9


def test_losses_depend_on_seed_and_ordinal_alone():
    f, x, ordinal = FlowMap(Net(), OT, "euler_fm", "none"), clean(10), torch.arange(2**40, 2**40 + 10)
    whole = losses(BASE, f, x, torch.zeros(10), ordinal, seed=3).loss_G
    order = [7, 2, 9]
    part = losses(BASE, f, x[order], torch.zeros(3), ordinal[order], seed=3).loss_G
    torch.testing.assert_close(part, whole[order], rtol=1e-13, atol=0)
    assert not (losses(BASE, f, x, torch.zeros(10), ordinal, seed=4).loss_G == whole).any()
    assert not (losses(BASE, f, x, torch.zeros(10), ordinal + 10, seed=3).loss_G == whole).any()


def test_labels_are_dropped_and_dropout_keyed_as_in_imm():
    net, n = Net(), 4000
    objective = flow_matching(t_min=0.0, t_max=1.0, label_drop=0.2)
    net.has_dropout = True
    f = FlowMap(net, OT, "euler_fm", "none", null_label=9)
    losses(objective, f, torch.ones(n, 1, dtype=torch.float64), torch.full((n,), 3), torch.arange(n), 0)
    _, _, _, label, key = net.calls[0]
    assert set(label.tolist()) == {3, 9}
    assert abs((label == 9).double().mean().item() - 0.2) < 4.5 * math.sqrt(0.16 / n)
    assert len(set(key.tolist())) == n


# ---------------------------------------------------------------------------------------------------------------------
# Gaussian data N(mu, s_data^2): the posterior-mean velocity and its ODE are known


class PosteriorVelocity(Backbone):
    """G = E[eps - x | x_t] / sigma_d for data N(mu, s_data^2), on `ot_fm`."""

    def __init__(self, mu, s_data):
        super().__init__()
        self.mu, self.s_data = mu, s_data

    def forward(self, x, c_noise, second, label, dropout_key=None):
        t = (c_noise / 1000).repeat_interleave(len(x) // len(c_noise)).view(-1, *[1] * (x.dim() - 1))
        x_t = x * SIGMA_D * torch.sqrt((1 - t) ** 2 + t**2)
        variance = (1 - t) ** 2 * self.s_data**2 + t**2 * SIGMA_D**2
        centred = x_t - (1 - t) * self.mu
        mean_eps = t * SIGMA_D**2 / variance * centred
        mean_x = self.mu + (1 - t) * self.s_data**2 / variance * centred
        return (mean_eps - mean_x) / SIGMA_D


def euler(mu, s_data, x, steps):
    f = FlowMap(PosteriorVelocity(mu, s_data), OT, "euler_fm", "none", SIGMA_D)
    grid = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return pushforward(f, x, grid, torch.zeros(len(x), dtype=torch.long))


@pytest.mark.parametrize(("mu", "s_data"), [(0.3, 0.2), (-1.0, 0.5), (0.0, 1.5)])
def test_many_euler_steps_land_on_the_closed_form_of_the_probability_flow(mu, s_data):
    x = clean(50, (3,))
    expected = mu + s_data / SIGMA_D * x  # f_{0,1}: V_0 = s_data^2, V_1 = sigma_d^2
    errors = [(euler(mu, s_data, x, steps) - expected).abs().max().item() for steps in (100, 200, 400)]
    assert errors[2] < 0.01 * expected.abs().max()
    # A method of first order: twice the steps, half the error.
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)
    # Richardson's extrapolation removes the first order.
    extrapolated = 2 * euler(mu, s_data, x, 400) - euler(mu, s_data, x, 200)
    torch.testing.assert_close(extrapolated, expected, rtol=0, atol=4e-4)


def test_one_euler_step_follows_one_velocity_and_misses():
    """Why few steps of flow matching fail (section 7): from t = 1 to 0 in one step all noise goes to the mean."""
    x = clean(50, (3,))
    torch.testing.assert_close(euler(0.3, 0.2, x, 1), torch.full_like(x, 0.3), rtol=0, atol=1e-12)


def test_loss_of_the_exact_velocity_is_the_posterior_variance():
    mu, s_data, n = 0.3, 0.2, 4000
    generator = torch.Generator().manual_seed(1)
    x = mu + s_data * torch.randn(n, 16, generator=generator, dtype=torch.float64)
    f = FlowMap(PosteriorVelocity(mu, s_data), OT, "euler_fm", "none", SIGMA_D)
    loss, t, _ = losses(BASE, f, x, torch.zeros(n), torch.arange(n), seed=0)
    variance = (1 - t) ** 2 * s_data**2 + t**2 * SIGMA_D**2
    covariance = t * SIGMA_D**2 - (1 - t) * s_data**2
    floor = (s_data**2 + SIGMA_D**2 - covariance**2 / variance) / SIGMA_D**2
    residual = loss - floor
    # Given t the loss is the floor times chi-squared_16 / 16: mean 0 within 4 standard errors, and that spread.
    assert residual.mean().abs() < 4 * residual.std() / math.sqrt(n)
    assert (residual / floor).std().item() == pytest.approx(math.sqrt(2 / 16), rel=0.1)
