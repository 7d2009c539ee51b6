"""Terminal velocity matching: the Lagrangian identity of the true map, and what carries a gradient."""

import pytest
import torch

from imm_scale.data.batch import Batch
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMapConfig
from imm_scale.methods.probability_path import OTFlowMatching, diffuse
from imm_scale.methods.tvm import Draws, TerminalVelocityMatching, TvmConfig

from .gaussian import batch, exact_map, gradient, labels, on_path, random_map
from .small import SIGMA_D

OT = OTFlowMatching()


def tvm(**settings):
    settings.setdefault("label_drop", 0.0)
    return TerminalVelocityMatching(TvmConfig(**settings).resolved("fp32"))


def test_the_true_maps_end_moves_as_the_velocity_there():
    flow_map, (x, eps, s, t) = exact_map(), on_path(50, 0.2, 0.9)
    x_t = diffuse(OT, x, eps, t[:, None])
    out, derivative = flow_map.with_target_tangent(x_t, s, t, labels(50))
    gap = (t - s)[:, None]
    landed = x_t - SIGMA_D * gap * out
    moved = SIGMA_D * (out - gap * derivative)
    torch.testing.assert_close(moved, flow_map.velocity(landed, s, labels(50)), rtol=1e-11, atol=1e-12)


def test_an_untrained_net_has_the_derived_losses():
    """Zero output: nothing moves and no velocity is told, so the terminal term is 0; the velocity's error is 2."""
    flow_map, data = random_map(zero_output=True), batch(2000)
    result = tvm().loss(flow_map, Batch(0, *data[:2], data[2], torch.ones(2000)), 7)
    assert float(result.monitors["residual"].abs().max()) == 0.0
    assert float(result.monitors["velocity_error"].mean()) == pytest.approx(
        2.0, rel=0.023
    )  # four times 2 sqrt(2 / 64,000)


def test_the_gradient_is_that_of_differences_with_the_velocity_held_still():
    flow_map, data = random_map(), batch()
    method = tvm()
    d = method.draw(flow_map, *data, 7)
    parameters = list(flow_map.parameters())
    generator = torch.Generator().manual_seed(3)
    along = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    gap = (d.t - d.s)[:, None, None, None]
    with torch.no_grad():
        out = flow_map.average(d.x_t, d.s, d.t, d.label)
        velocity = flow_map.velocity(d.x_t - SIGMA_D * gap * out, d.s, d.label)

    def loss_at(step):
        with torch.no_grad():
            for p, direction in zip(parameters, along, strict=True):
                p.add_(direction, alpha=step)
            out, derivative = flow_map.with_target_tangent(d.x_t, d.s, d.t, d.label)
            local = flow_map.average(d.x_u, d.u, d.u, d.label)
            errors = (out - gap * derivative - velocity / SIGMA_D).square() + (local - d.v / SIGMA_D).square()
            return float(errors.mean(dim=(1, 2, 3)).sum())

    slope = float((gradient(method, flow_map, data) * torch.cat([a.flatten() for a in along])).sum())
    h = 1e-6
    difference = (loss_at(h) - loss_at(-2 * h)) / (2 * h)
    assert abs(difference - slope) < 1e-6 * abs(slope)  # h^2 and eps / h, times what the net makes of them


def test_times_are_ordered_and_keyed_by_the_group():
    method = tvm()
    s, t, u = method.draw_times(torch.arange(20_000), 3)
    assert (s >= 0).all() and (s < t).all() and (t <= 1).all()
    length = torch.logit(t - s)
    assert float(length.mean()) == pytest.approx(-0.8, abs=0.03) and float(length.std()) == pytest.approx(1.0, abs=0.03)
    assert float(torch.logit(u).mean()) == pytest.approx(-0.4, abs=0.03)
    part = method.draw_times(torch.arange(5, 9), 3)
    assert all(torch.equal(a, b[5:9]) for a, b in zip(part, (s, t, u), strict=True))


@pytest.mark.parametrize("settings", [{"parameterization": "simple_edm"}, {"second_time": "none"}])
def test_what_does_not_fit_is_refused(settings):
    with pytest.raises(UserError, match=r"method\.name=tvm needs"):
        TvmConfig(flow_map=FlowMapConfig(**settings)).validate()


def test_draws_stand_on_one_path():
    flow_map, data = random_map(), batch()
    d: Draws = tvm().draw(flow_map, *data, 7)
    at_t, at_u = d.t[:, None, None, None], d.u[:, None, None, None]
    torch.testing.assert_close(d.x_t - at_t * d.v, data[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(d.x_u - at_u * d.v, data[0], rtol=1e-12, atol=1e-13)
