"""A weaker map as the guide (Karras et al. 2024, arXiv 2406.02507), with nets whose guided samples are known."""

import math

import numpy as np
import pytest
import torch

from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import OTFlowMatching, VPCosine
from imm_scale.methods.samplers import Guidance, heun, pushforward
from imm_scale.models.base import Backbone
from tests.unit.methods.small import Net

OT = OTFlowMatching()
SIGMA_D = 0.5
FP64 = 1e-12
LABELS = torch.zeros(6, dtype=torch.int64)


class OfGaussian(Backbone):
    """G under `euler_fm` of the exact map of N(0, a^2) data: f_{s,t}(x) = sqrt(V_s / V_t) x, V the variance of x_t.

    Without a second time it is the velocity, the limit of s -> t.
    """

    def __init__(self, a: float):
        super().__init__()
        self.a, self.calls = a, 0
        self.nothing = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def variance(self, t):
        return (self.a * (1 - t)) ** 2 + (SIGMA_D * t) ** 2

    def forward(self, x, c_noise, second, label, dropout_key=None):
        self.calls += 1
        t = float(c_noise) / 1000
        x_t = x * SIGMA_D * math.hypot(1 - t, t)  # c_in undone
        if second is None:
            return (SIGMA_D**2 * t - self.a**2 * (1 - t)) / self.variance(t) * x_t / SIGMA_D
        s = float(second) / 1000
        return (1 - math.sqrt(self.variance(s) / self.variance(t))) / (SIGMA_D * (t - s)) * x_t


def _map(a, second_time="s"):
    return FlowMap(OfGaussian(a), OT, "euler_fm", second_time, SIGMA_D)


def _noise():
    return SIGMA_D * torch.randn(6, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("w", [0.0, 1.0, 1.5, 3.0])
def test_one_jump_is_w_of_the_map_and_1_minus_w_of_the_guide(w):
    """From noise to N(0, a^2) and to N(0, b^2): a / sigma_d and b / sigma_d of where it started."""
    a, b, x = 0.3, 0.7, _noise()
    grid = torch.tensor([1.0, 0.0], dtype=torch.float64)
    z = pushforward(_map(a).guided_by(_map(b)), x, grid, LABELS, Guidance(w))
    np.testing.assert_allclose(z.numpy(), (w * a + (1 - w) * b) / SIGMA_D * x.numpy(), rtol=FP64)


@pytest.mark.parametrize(("w", "sampler"), [(1.5, pushforward), (2.0, pushforward), (2.0, heun)])
def test_many_steps_draw_the_powers_of_both(w, sampler):
    """Along w v_a + (1 - w) v_b the logarithms of the scales add up: a^w b^(1 - w), narrower than a for a wider b."""
    a, b, x = 0.3, 0.7, _noise()
    second_time = "none" if sampler is heun else "s"
    guided = _map(a, second_time).guided_by(_map(b, second_time))
    scales = []
    for steps in (200, 400):
        z = sampler(guided, x, torch.linspace(1, 0, steps + 1, dtype=torch.float64), LABELS, Guidance(w))
        scales.append(float((z / x).mean()) * SIGMA_D)
    expected = a**w * b ** (1 - w)
    errors = [abs(scale - expected) for scale in scales]
    assert scales[1] == pytest.approx(expected, rel=5e-3)  # first order at 400 steps, by far less for heun
    assert errors[1] < 0.6 * errors[0], "it converges to it"
    assert expected < a < b


def test_a_guide_of_the_same_kind_is_what_mixing_the_outputs_is():
    """D_guide + w (D - D_guide) for G itself, where both predict the same thing."""
    x, label = _noise(), torch.arange(6) % 5
    s, t = (torch.tensor([v], dtype=torch.float64) for v in (0.2, 0.8))
    strong, weak = Net(), Net()
    weak.w.data *= 0.5
    y = FlowMap(strong, OT, null_label=4).guided_by(FlowMap(weak, OT))(x, s, t, label, guidance_scale=2.5)
    scaled = x / (SIGMA_D * math.hypot(0.2, 0.8))
    g, h = strong(scaled, 1000 * t, 1000 * s, label), weak(scaled, 1000 * t, 1000 * s, label)
    expected = x - SIGMA_D * 0.6 * (h + 2.5 * (g - h))
    torch.testing.assert_close(y, expected, rtol=FP64, atol=FP64)
    assert torch.equal(weak.calls[0][3], label), "the guide is told the label"


def test_a_guide_may_predict_something_else():
    x, label = _noise(), torch.zeros(6, dtype=torch.int64)
    times = [torch.tensor([v], dtype=torch.float64) for v in (0.2, 0.8)]
    ours, guide = FlowMap(Net(), OT, "euler_fm"), FlowMap(Net(), OT, "simple_edm", "t_minus_s")
    y = ours.guided_by(guide)(x, *times, label, guidance_scale=1.5)
    torch.testing.assert_close(y, 1.5 * ours(x, *times, label) - 0.5 * guide(x, *times, label), rtol=FP64, atol=FP64)


def test_what_guidance_costs_and_where():
    ours, guide = _map(0.3), _map(0.7)
    guided = ours.guided_by(guide)
    grid = torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=torch.float64)
    pushforward(guided, _noise(), grid, LABELS, Guidance(2.0, 0.2, 0.7))
    assert (ours.model.calls, guide.model.calls) == (3, 2)
    pushforward(guided, _noise(), grid, LABELS)
    assert (ours.model.calls, guide.model.calls) == (6, 2), "w = 1 is off"


def test_the_map_itself_stays_as_it_was():
    ours, guide = _map(0.3), _map(0.7)
    guided = ours.guided_by(guide)
    assert ours.guide is None and guided.guide is guide and guided.model is ours.model
    assert {name.partition(".")[0] for name, _ in ours.named_parameters()} == {"model"}
    assert not any(parameter.requires_grad for parameter in guided.eval().requires_grad_(False).parameters())
    assert len(list(guided.parameters())) == 2


def test_a_guide_on_another_trajectory_is_refused():
    with pytest.raises(UserError, match="the guide was trained on trajectory vp_cosine, the model on ot_fm"):
        _map(0.3).guided_by(FlowMap(Net(), VPCosine(), "simple_edm"))
