"""Guidance as a condition: its draws, its velocity, and what the net is told, against formulas written otherwise."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from imm_scale.data.batch import Batch
from imm_scale.data.manifest import Codec
from imm_scale.data.spaces import Latents
from imm_scale.errors import UserError
from imm_scale.methods.eulerian import Eulerian, EulerianConfig, condition
from imm_scale.methods.eulerian.guidance import TrainingGuidanceConfig
from imm_scale.methods.eulerian.residuals import ResidualConfig
from imm_scale.methods.eulerian.steps import StepConfig
from imm_scale.methods.flow_map import FlowMap, FlowMapConfig
from imm_scale.methods.flow_matching import FlowMatchingConfig
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.methods.samplers import SAMPLERS, Guidance
from imm_scale.methods.two_times import TwoTimesConfig
from imm_scale.models.base import Backbone
from imm_scale.models.dit import DiT, DiTConfig

from .gaussian import batch, gradient, random_map, variance
from .small import SIGMA_D, Net, losses

OT = OTFlowMatching()
TOLD = TrainingGuidanceConfig(kind="condition")


def told_method(**settings):
    """Improved MeanFlow with its guidance."""
    settings = {"tangent_mix": 1.0, "times": TwoTimesConfig(equal=0.5), "guidance": TOLD, **settings}
    return Eulerian(EulerianConfig(**settings).resolved("fp32"))


def told_map(**net):
    return random_map(guidance=True, **net)


# --- draws ---


@pytest.mark.parametrize(("power", "largest"), [(1.0, 8.0), (2.0, 8.0), (0.0, 4.0), (1.5, 3.0)])
def test_scales_have_the_density_of_their_power(power, largest):
    """The distribution function at W is the integral of w^-power up to W over that up to the largest."""
    n = 40_000
    never = torch.zeros(n, dtype=torch.bool)
    told = condition.draw(replace(TOLD, power=power, largest=largest), torch.arange(n), never, never, seed=3)
    drawn = 1.0 / (1.0 - told[:, 0])
    assert drawn.min() >= 1.0 and drawn.max() <= largest
    for at in np.linspace(1.0, largest, 7)[1:-1]:
        w, dw = np.linspace(1.0, largest, 200_001, retstep=True)
        density = w**-power
        expected = np.sum(density[w <= at]) / np.sum(density)
        assert dw < 1e-4
        # four standard deviations of a share, and the sum's error
        assert float((drawn <= at).double().mean()) == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(n) + 1e-4)


def test_quantiles_of_power_one_are_powers_of_the_largest():
    u = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(condition.scales(TOLD, u), torch.tensor([1.0, 2.0, 4.0, 8.0]).double())


def test_intervals_are_uniform_and_whole_where_s_is_t():
    n = 40_000
    group = torch.arange(n)
    told = condition.draw(TOLD, group, group % 2 == 0, group % 5 == 0, seed=3)
    low, high = told[1::2, 1], told[1::2, 2]
    assert (told[::2, 1] == 0.0).all() and (told[::2, 2] == 1.0).all()
    for value, first in ((low, 0.0), (high, 0.5)):
        assert value.min() >= first and value.max() <= first + 0.5
        shares = torch.histc(value.float(), 10, first, first + 0.5) / len(value)
        np.testing.assert_allclose(shares, 0.1, atol=4 * 0.3 / math.sqrt(n / 2))
    assert abs(float(torch.corrcoef(torch.stack([low, high]))[0, 1])) < 4 / math.sqrt(n / 2)
    assert (told[::5, 0] == 0.0).all(), "W = 1 without a label"
    assert (told[1::5, 0] > 0.0).all()


def test_what_is_told_is_a_function_of_the_group_alone():
    method, flow_map, (x, label, ordinal) = told_method(), told_map(), batch()
    whole = method.draw(flow_map, x, label, ordinal, 7).guidance
    for start, stop in ((0, 3), (3, 4), (4, 16)):
        part = method.draw(flow_map, x[start:stop], label[start:stop], ordinal[start:stop], 7).guidance
        assert torch.equal(part, whole[start:stop])


# --- the guided velocity ---


def test_the_guided_velocity_is_that_of_the_formula_sample_by_sample():
    flow_map, (x, label, ordinal) = told_map(), batch()
    label = torch.where(ordinal % 5 == 0, 3, label)  # dropped
    t, v = torch.linspace(0.02, 0.98, 16).double(), x.flip(0)
    scale, low, high = 1.0 + ordinal.double() / 2, 0.03 * ordinal.double(), 1.0 - 0.02 * ordinal.double()
    told = torch.stack([torch.where(label == 3, 0.0, (scale - 1) / scale), low, high], dim=1)
    v_g, own = condition.guided(flow_map, x, v, t, label, None, told)
    inside = 0
    for i in range(16):
        guided = label[i] < 3 and low[i] <= t[i] <= high[i]
        inside += bool(guided)
        w = float(scale[i]) if guided else 1.0

        def velocity(y, w, i=i):
            row = torch.tensor([[1 - 1 / w, 0.0, 1.0]], dtype=torch.float64)
            scaled = x[i : i + 1] / (SIGMA_D * math.hypot(1 - t[i], t[i]))
            zero = torch.zeros(1).double()
            with torch.no_grad():
                return SIGMA_D * flow_map.model(scaled, t[i : i + 1], zero, torch.tensor([y]), None, row)

        mine, none = velocity(int(label[i]), w), velocity(3, 1.0)
        torch.testing.assert_close(own[i : i + 1], mine, rtol=1e-11, atol=1e-12)
        expected = v[i : i + 1] + mine - none - (mine - none) / w
        torch.testing.assert_close(v_g[i : i + 1], expected, rtol=1e-11, atol=1e-12)
        if not guided:
            assert torch.equal(v_g[i], v[i])
    assert 3 < inside < 13


class GuidedGaussian(Backbone):
    """G at s = t of the velocity W v_y - (W - 1) v of classes N(y, STD^2) whose mean without label is 0."""

    takes_guidance = True

    def forward(self, scaled, c_noise, second, label, dropout_key=None, guidance=None):
        t, strength = c_noise[:, None], guidance[:, :1]
        x = scaled * SIGMA_D * torch.hypot(1 - t, t)
        w = 1.0 / (1.0 - strength)
        mean = torch.where(label == 3, 0.0, label.double())[:, None]
        return (w * marginal(x, t, mean) - (w - 1.0) * marginal(x, t, torch.zeros_like(mean))) / SIGMA_D


def marginal(x, t, mean):
    slope = -2 * (1 - t) * 0.7**2 + 2 * t * SIGMA_D**2
    return -mean + slope / (2 * variance(t)) * (x - (1 - t) * mean)


def test_classifier_free_guidance_of_that_scale_is_the_fixed_point():
    """Where the net answers W v_y - (W - 1) v, the mean of its target is just that: published guidance."""
    flow_map, n = FlowMap(GuidedGaussian(), OT, "euler_fm", "s", SIGMA_D, 1.0, null_label=3), 64
    label = torch.arange(n) % 3
    t = torch.linspace(0.01, 0.99, n).double()
    x = torch.linspace(-2.0, 3.0, n).double()[:, None]
    w = torch.linspace(1.0, 8.0, n).double()
    told = torch.stack([1 - 1 / w, torch.zeros(n), torch.ones(n)], dim=1)
    v = marginal(x, t[:, None], label.double()[:, None])  # the conditional velocity's mean
    v_g, own = condition.guided(flow_map, x, v, t, label, None, told)
    torch.testing.assert_close(v_g, own, rtol=1e-11, atol=1e-11)
    expected = v + (w - 1)[:, None] * (v - marginal(x, t[:, None], torch.zeros(n, 1).double()))
    torch.testing.assert_close(v_g, expected, rtol=1e-11, atol=1e-11)


# --- the loss ---


def test_the_loss_is_that_of_the_formula_by_autograd():
    """||V - v_g / sd||^2 with V = u + (t - s) du/dt held, its tangent by torch's forward mode, adaptive weights."""
    flow_map, (x, label, ordinal) = told_map(qk_norm=True), batch()
    method = told_method(times=TwoTimesConfig(equal=0.0))
    d = method.draw(flow_map, x, label, ordinal, 7)
    assert len(set(d.guidance[:, 0].tolist())) > 10 and (d.label == 3).any()
    v_g, own = condition.guided(flow_map, d.x_t, d.v, d.t, d.label, None, d.guidance)

    def composite(x_t, t):
        norm = (SIGMA_D * torch.hypot(1 - t, t))[:, None, None, None]
        return flow_map.model(x_t / norm, t, t - d.s, d.label, None, d.guidance)

    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        _, derivative = torch.func.jvp(composite, (d.x_t, d.t), (own, torch.ones_like(d.t)))
    u = composite(d.x_t, d.t)
    error = u + (d.t - d.s)[:, None, None, None] * derivative - v_g / SIGMA_D
    square = error.square().flatten(1).sum(1)
    loss = (square / (square + 0.01).detach()).sum()
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(flow_map.parameters()))])
    ours = gradient(method, flow_map, (x, label, ordinal))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-10
    torch.testing.assert_close(losses(method, flow_map, x, label, ordinal, 7).loss_G.sum(), loss, rtol=1e-10, atol=0)


def test_velocities_of_the_target_and_the_tangent_carry_no_gradient():
    flow_map, (x, label, ordinal) = told_map(), batch()
    method = told_method()
    d = method._guided(flow_map, method.draw(flow_map, x, label, ordinal, 7))
    assert not d.v.requires_grad and not d.own.requires_grad
    out, e, _ = method._by_tangent(flow_map, d, 16)
    assert out.requires_grad and not e.requires_grad


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_the_tangent_runs_along_the_mix_with_the_guided_velocity(mix):
    flow_map, (x, label, ordinal) = told_map(), batch()
    method = told_method(tangent_mix=mix, residual=ResidualConfig(kind="l2"), times=TwoTimesConfig(equal=0.0))
    d = method.draw(flow_map, x, label, ordinal, 7)
    v_g, own = condition.guided(flow_map, d.x_t, d.v, d.t, d.label, None, d.guidance)
    out, derivative = flow_map.with_tangent(d.x_t, (1 - mix) * v_g + mix * own, d.s, d.t, d.label, guidance=d.guidance)
    e = out - v_g / SIGMA_D + (d.t - d.s)[:, None, None, None] * derivative
    monitors = losses(method, flow_map, x, label, ordinal, 7).monitors
    torch.testing.assert_close(monitors["residual"], e.square().mean(dim=(1, 2, 3)).detach(), rtol=1e-9, atol=0)


def test_a_difference_is_told_the_same_at_both_points():
    flow_map, (x, label, ordinal) = told_map(), batch()
    method = told_method(
        derivative="difference",
        tangent_mix=0.0,
        step=StepConfig(start=0.1, end=0.1),
        times=TwoTimesConfig(equal=0.0, min_gap=0.01),
    )
    d = method.draw(flow_map, x, label, ordinal, 7)
    v_g, _ = condition.guided(flow_map, d.x_t, d.v, d.t, d.label, None, d.guidance)
    back = d.t - d.r
    a = (back / (d.t - d.s))[:, None, None, None]
    with torch.no_grad():
        out = flow_map.average(d.x_t, d.s, d.t, d.label, guidance=d.guidance)
        x_r = d.x_t - back[:, None, None, None] * v_g
        out_r = flow_map.average(x_r, d.s, d.r, d.label, guidance=d.guidance)
    e = (out - (1 - a) * out_r) / a - v_g / SIGMA_D
    monitors = losses(method, flow_map, x, label, ordinal, 7).monitors
    torch.testing.assert_close(monitors["residual"], e.square().mean(dim=(1, 2, 3)), rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", ["tangent", "difference"])
def test_whole_strata_give_the_same_losses_and_gradients(kind):
    difference = {"derivative": "difference", "tangent_mix": 0.0, "step": StepConfig(start=0.1, end=0.1)}
    method = told_method(**(difference if kind == "difference" else {}))
    flow_map = told_map(dropout=0.2)
    x, label, ordinal = batch()
    results = []
    for alignment in (1, 8):
        result = method.loss(flow_map, Batch(0, x, label, ordinal + 8, torch.ones(16), alignment), 7)
        gradients = torch.autograd.grad(result.loss_G.sum(), list(flow_map.parameters()))
        results.append((result.loss_G, torch.cat([g.flatten() for g in gradients])))
    (whole, slope), (split, split_slope) = results
    torch.testing.assert_close(split, whole, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(split_slope, slope, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("alignment", "units"), [(1, 6.1), (4, 5.55)])
def test_a_step_costs_the_forward_units_that_are_counted(alignment, units):
    """3 with gradient, 2 of the guided velocity, and the tangent of the share with s before t; none for its direction.

    That is 1 less than one pass for each velocity that the paper names.
    """
    method = told_method()
    net = DiTConfig(128, 4, 4, 2, channels=4, height=16, image_width=16, num_classes=3, guidance=True)
    flow_map, n = FlowMap(DiT(net), OT, "euler_fm", "t_minus_s", SIGMA_D, 1.0, null_label=3), 8
    ordinal, x = torch.arange(n), torch.zeros(n, 4, 16, 16)

    def counted(work):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    with torch.no_grad():
        forward = counted(lambda: flow_map.average(x, torch.zeros(n), torch.ones(n), ordinal % 3))
    given = Batch(0, x, ordinal % 3, ordinal, torch.ones(n), alignment)
    step = counted(lambda: method.loss(flow_map, given, 0).loss_G.sum().backward())
    assert method.config.passes_at(alignment).forwards == pytest.approx(units)
    assert step / forward == pytest.approx(units, abs=0.06)  # attention's share, the first layer without dx


def test_at_scale_one_it_is_the_loss_without_guidance(monkeypatch):
    """Of a net whose embedder still answers 0 at any scale: the velocity with a label less that with it is 0."""
    flow_map, plain = told_map(), random_map()
    with torch.no_grad():
        for parameter in flow_map.model.guidance_embedder.mlp[2].parameters():
            parameter.zero_()
    weights = {k: v for k, v in flow_map.model.state_dict().items() if not k.startswith("guidance_embedder")}
    plain.model.load_state_dict(weights)
    without = Eulerian(replace(told_method().config, guidance=TrainingGuidanceConfig()))
    expected = losses(without, plain, *batch(), 7)
    monkeypatch.setattr(condition, "scales", lambda config, u: torch.ones_like(u))
    got = losses(told_method(), flow_map, *batch(), 7)
    torch.testing.assert_close(got.loss_G, expected.loss_G, rtol=1e-12, atol=0)
    for name, value in expected.monitors.items():
        torch.testing.assert_close(got.monitors[name], value, rtol=1e-10, atol=1e-13)


# --- the net ---


def test_a_fresh_net_is_the_one_without_whatever_it_is_told():
    fields = {"width": 16, "depth": 1, "heads": 2, "patch_size": 2, "channels": 2, "height": 4, "image_width": 4}
    torch.manual_seed(0)
    plain = DiT(DiTConfig(**fields))
    torch.manual_seed(0)
    net = DiT(DiTConfig(**fields, guidance=True))
    own, others = net.state_dict(), plain.state_dict()
    assert {name.split(".")[0] for name in own.keys() - others.keys()} == {"guidance_embedder"}
    assert all(torch.equal(own[name], value) for name, value in others.items())
    last, first = net.guidance_embedder.mlp[2], net.guidance_embedder.mlp[0]
    assert not last.weight.any() and not last.bias.any()
    assert float(first.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not net.guidance_embedder(torch.rand(5, 3).double()).any()


def test_each_of_the_three_numbers_reaches_the_answer():
    flow_map, (x, label, _) = told_map(), batch(4)
    s, t, told = torch.full((4,), 0.1).double(), torch.full((4,), 0.9).double(), torch.rand(4, 3).double()
    with torch.no_grad():
        answers = [flow_map.average(x, s, t, label, guidance=told)]
        for i in range(3):
            other = told.clone()
            other[:, i] += 0.1
            answers.append(flow_map.average(x, s, t, label, guidance=other))
    for i in range(4):
        for j in range(i):
            assert (answers[i] - answers[j]).abs().amax(dim=(1, 2, 3)).min() > 1e-6


def test_the_tangent_does_not_move_with_the_guidance():
    flow_map, (x, label, _) = told_map(qk_norm=True), batch(4)
    model, t = flow_map.model, torch.linspace(0.2, 0.8, 4).double()
    told, dx = torch.rand(4, 3).double(), x.flip(0)
    arguments = x, dx, t, torch.ones_like(t), 0.3 * t, torch.ones_like(t), label, None, told
    value, tangent = model.with_tangent(*arguments)
    reference, expected = Backbone.with_tangent(model, *arguments)
    torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(tangent, expected, rtol=1e-10, atol=1e-12)
    h = 1e-6
    with torch.no_grad():
        ahead, behind = (model(x + d * dx, t + d, 0.3 * t + d, label, None, told) for d in (h, -h))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-7)


def test_both_branches_of_a_pair_are_told():
    flow_map, (x, label, _) = told_map(), batch(4)
    told, times = torch.rand(4, 3).double(), torch.linspace(0.2, 0.8, 4).double()
    arguments = x, x[:2].flip(0), times, times[:2] / 2, times / 3, times[:2] / 4, label
    for pair, reference in zip(
        flow_map.model.pair(*arguments, None, told), Backbone.pair(flow_map.model, *arguments, None, told), strict=True
    ):
        torch.testing.assert_close(pair, reference, rtol=1e-12, atol=1e-13)


# --- samples ---


@pytest.mark.parametrize("sampler", ["pushforward", "restart"])
def test_a_step_is_one_pass_that_is_told_scale_and_interval(sampler):
    flow_map, (x, label, _) = told_map(), batch(4)
    grid, noise = torch.tensor([1.0, 0.6, 0.3, 0.0]).double(), x.flip(0)
    told = torch.tensor([[1 - 1 / 7.5, 0.4, 0.65]], dtype=torch.float64)
    expected, calls = x, []
    with torch.no_grad():
        for step in range(3):
            t, s = grid[step], grid[step + 1] if sampler == "pushforward" else grid[-1]
            scaled = expected / (SIGMA_D * math.hypot(1 - t, t))
            second = (t - s)[None].expand(4)
            u = SIGMA_D * flow_map.model(scaled, t.expand(4), second, label, None, told.expand(4, 3))
            expected = expected - (t - s) * u
            if sampler == "restart" and step < 2:
                expected = (1 - grid[step + 1]) * expected + grid[step + 1] * noise
    hook = flow_map.model.register_forward_pre_hook(lambda *_: calls.append(1))
    got = SAMPLERS[sampler](flow_map, x, grid, label, Guidance(7.5, 0.4, 0.65), lambda step: noise)
    hook.remove()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 3


def test_without_guidance_it_is_told_scale_one_at_all_times():
    flow_map, (x, label, _) = told_map(), batch(4)
    grid = torch.tensor([1.0, 0.0]).double()
    s, t = torch.zeros(1).double(), torch.ones(1).double()
    told = torch.tensor([[0.0, 0.0, 1.0]]).double()
    with torch.no_grad():
        expected = flow_map(x, s, t, label, guidance=told)
        assert torch.equal(flow_map(x, s, t, label), expected)
    assert torch.equal(SAMPLERS["pushforward"](flow_map, x, grid, label), expected)
    with pytest.raises(UserError, match="is told its guidance"):
        flow_map(x, s, t, label, 2.0)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": replace(TOLD, omega=2.0)}, "method.guidance.omega=2.0 has no meaning"),
        ({"guidance": replace(TOLD, high=0.5)}, "method.guidance.high=0.5 has no meaning"),
        ({"guidance": TrainingGuidanceConfig(largest=4.0)}, "method.guidance.largest=4.0 has no meaning"),
        ({"guidance": TOLD, "label_drop": 0.0}, "method.label_drop above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        EulerianConfig(**settings).validate()


@pytest.mark.parametrize(
    ("scale", "interval", "message"),
    [
        (0.5, (0.0, 1.0), "sampling.guidance_scale=0.5"),
        (8.5, (0.0, 1.0), "method.guidance.largest=8"),
        (4.0, (0.6, 0.9), "sampling.guidance_interval"),
        (4.0, (0.1, 0.4), "end at 0.5 at the earliest"),
    ],
)
def test_guidance_that_was_never_told_is_refused(scale, interval, message):
    config = told_method().config
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        config.check_guidance(scale, interval)
    replace(config, guidance=TrainingGuidanceConfig()).check_guidance(scale, interval)
    for fits in ((1.0, (0.0, 1.0)), (8.0, (0.5, 0.5 + 1e-9)), (7.5, (0.4, 0.65))):
        config.check_guidance(*fits)


def test_a_net_that_cannot_be_told_is_refused():
    space = Latents(SIGMA_D, (2, 4, 4), Codec("pixels", "", 4, 1, 1, (0.0,), (1.0,)), 3, ())
    told, plain = told_method(), Eulerian(EulerianConfig().resolved("fp32"))
    with pytest.raises(UserError, match="cannot be told"):
        told.wrap(Net(), space)
    with pytest.raises(UserError, match="wants to be told"):
        plain.wrap(told_map().model, space)
    assert told.wrap(told_map().model, space).takes_guidance


def test_what_it_was_told_is_not_forgotten_silently():
    told, plain = told_method().config, EulerianConfig(flow_map=told_method().config.flow_map).resolved("fp32")
    assert plain.unlike(told) == {"guidance.kind": ("condition", "fixed")}
    assert told.unlike(plain) == {} == told.unlike(told)
    flow = FlowMatchingConfig(flow_map=FlowMapConfig(second_time=told.flow_map.second_time)).resolved("fp32")
    assert flow.unlike(told) == {"name": ("eulerian", "flow_matching")}
