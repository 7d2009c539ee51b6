"""Shortcut models: the semigroup identity, exactly, and what the grid and the halves are."""

import numpy as np
import pytest
import torch

from imm_scale.data.batch import Batch
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMapConfig
from imm_scale.methods.probability_path import OTFlowMatching, diffuse
from imm_scale.methods.shortcut import Draws, Shortcut, ShortcutConfig
from imm_scale.methods.two_times import TwoTimesConfig

from .gaussian import batch, exact_map, gradient, labels, on_path, random_map
from .small import SIGMA_D

OT = OTFlowMatching()


def shortcut(**settings):
    settings.setdefault("label_drop", 0.0)
    return Shortcut(ShortcutConfig(**settings).resolved("fp32"))


@pytest.mark.parametrize("near", [0.0, 0.3, 0.5, 1.0])
def test_the_true_map_jumps_once_as_it_jumps_twice(near):
    flow_map, (x, eps, s, t) = exact_map(), on_path(50, 0.2, 0.9)
    x_t = diffuse(OT, x, eps, t[:, None])
    d = Draws(x_t, eps - x, s, t, torch.full_like(t, near), labels(50), None)
    out = flow_map.average(x_t, s, t, labels(50))
    torch.testing.assert_close(shortcut().two_jumps(flow_map, d, 50), out, rtol=1e-11, atol=1e-12)


def test_two_jumps_land_where_the_sampler_lands():
    flow_map, data = random_map(), batch()
    method = shortcut(split="uniform", grid=None, times=TwoTimesConfig(equal=0.0))
    d = method.draw(flow_map, *data, 7)
    m = d.s + d.near * (d.t - d.s)
    with torch.no_grad():
        landed = flow_map(flow_map(d.x_t, m, d.t, d.label), d.s, m, d.label)
        target = method.two_jumps(flow_map, d, 16)
    one = d.x_t - SIGMA_D * (d.t - d.s)[:, None, None, None] * target
    torch.testing.assert_close(one, landed, rtol=1e-11, atol=1e-12)


def test_times_are_dyadic_on_the_grid():
    method, group = shortcut(times=TwoTimesConfig(equal=0.5)), torch.arange(40_000)
    s, t, equal = method.draw_times(random_map(), group, 3)
    gap = (t - s)[~equal].numpy()
    levels, counts = np.unique(-np.log2(gap), return_counts=True)
    np.testing.assert_array_equal(levels, np.arange(7))  # 1 to 1/64
    np.testing.assert_allclose(counts / counts.sum(), 1 / 7, atol=0.015)  # four times sqrt(p q / 20,000)
    assert ((t[~equal].numpy() / gap) % 1 == 0).all() and (s >= 0).all() and (t <= 1).all()
    on_grid = 128 * t[equal].numpy()
    assert (on_grid % 1 == 0).all() and len(np.unique(on_grid)) == 128


def test_where_s_is_t_it_is_flow_matching_and_elsewhere_a_regression_on_two_jumps():
    flow_map, data = random_map(), batch()
    method = shortcut(times=TwoTimesConfig(equal=0.5))
    d = method.draw(flow_map, *data, 7)
    two = method.two_jumps(flow_map, d, 16)
    target = torch.where((d.s == d.t)[:, None, None, None], d.v / SIGMA_D, two)
    loss = (flow_map.average(d.x_t, d.s, d.t, d.label) - target).square().mean(dim=(1, 2, 3))
    by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), list(flow_map.parameters()))])
    torch.testing.assert_close(gradient(method, flow_map, data), by_hand, rtol=1e-9, atol=1e-12)


def test_targets_of_jumps_alone_are_clipped():
    flow_map, data = random_map(), batch()
    method = shortcut(clip=0.1, times=TwoTimesConfig(equal=0.5))
    d = method.draw(flow_map, *data, 7)
    target = torch.where(
        (d.s == d.t)[:, None, None, None], d.v / SIGMA_D, method.two_jumps(flow_map, d, 16).clamp(-0.1, 0.1)
    )
    loss = (flow_map.average(d.x_t, d.s, d.t, d.label) - target).square().mean(dim=(1, 2, 3))
    result = method.loss(flow_map, Batch(0, *data[:2], data[2], torch.ones(16)), 7)
    torch.testing.assert_close(result.loss_G, loss.double(), rtol=1e-12, atol=0)


def test_an_untrained_net_agrees_with_itself():
    """Zero output: the velocity's error is 2 per element, the two ways are 0 apart."""
    flow_map, data = random_map(zero_output=True), batch(2000)
    method = shortcut(times=TwoTimesConfig(equal=0.5))
    result = method.loss(flow_map, Batch(0, *data[:2], data[2], torch.ones(2000), 4), 7)
    equal = result.monitors["gap"] == 0
    assert float(result.loss_G[~equal].detach().abs().max()) == 0.0
    assert float(result.loss_G[equal].detach().mean()) == pytest.approx(2.0, rel=0.032)  # four times 2 sqrt(2 / 32,000)


@pytest.mark.parametrize("settings", [{}, {"split": "uniform", "grid": None}])
def test_whole_strata_spare_the_jumps_of_the_others(settings):
    flow_map, (x, label, ordinal) = random_map(dropout=0.2), batch()
    method = shortcut(times=TwoTimesConfig(equal=0.75), label_drop=0.1, **settings)
    whole, split = (method.loss(flow_map, Batch(0, x, label, ordinal, torch.ones(16), a), 7) for a in (1, 4))
    torch.testing.assert_close(split.loss_G, whole.loss_G, rtol=1e-12, atol=1e-14)
    assert method.config.passes_at(4).forwards == 3.5 and method.config.passes_at(1).forwards == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flow_map": FlowMapConfig(parameterization="simple_edm")}, "euler_fm"),
        ({"grid": 100}, "power of 2"),
        ({"split": "uniform"}, "grid=null"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ShortcutConfig(**settings).validate()
