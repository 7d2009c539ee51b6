"""The Eulerian losses against closed forms for Gaussian data, and against one another."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from imm_scale import rng
from imm_scale.data.batch import Batch
from imm_scale.errors import UserError
from imm_scale.methods import imm_times, two_times
from imm_scale.methods.eulerian import Eulerian, EulerianConfig, residuals
from imm_scale.methods.eulerian.guidance import TrainingGuidanceConfig, faded, guided
from imm_scale.methods.eulerian.residuals import ResidualConfig
from imm_scale.methods.eulerian.steps import StepConfig, next_time, share
from imm_scale.methods.flow_map import FlowMap, FlowMapConfig
from imm_scale.methods.probability_path import OTFlowMatching, VPCosine, diffuse
from imm_scale.methods.two_times import TwoTimesConfig
from imm_scale.models.base import Backbone
from imm_scale.models.dit import DiT, DiTConfig

from .gaussian import STD, batch, exact_map, gradient, labels, marginal_velocity, on_path, random_map, variance
from .small import SIGMA_D, flow_matching, losses

OT, COSINE = OTFlowMatching(), VPCosine()
PAIRS = [(0.0, 1.0), (0.0, 0.5), (0.3, 0.6)]


@pytest.mark.parametrize(("s", "t"), [*PAIRS, (0.4, 0.4)])
def test_the_residual_of_the_true_map_along_the_marginal_velocity_is_zero(s, t):
    flow_map, (x, eps, s_N, t_N) = exact_map(), on_path(50, s, t)
    x_t = diffuse(OT, x, eps, t_N[:, None])
    v = marginal_velocity(x_t, t_N[:, None])
    out, derivative = flow_map.with_tangent(x_t, v, s_N, t_N, labels(50))
    e = flow_map.residual(x_t, v, out, torch.nan_to_num(derivative) if s == t else derivative, s_N, t_N)
    assert float(e.abs().max()) < 1e-12  # fp64, over a quotient by t - s
    torch.testing.assert_close(flow_map.velocity(x_t, t_N, labels(50)), v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("s", "t", "meanflow", "improved"),
    [(*p, m, i) for p, m, i in zip(PAIRS, (0.960, 1.754, 1.134), (0.490, 0.662, 0.727), strict=True)],
)
def test_the_loss_of_the_true_map_has_the_published_floor(s, t, meanflow, improved):
    """In velocity units: what is left is how far x, eps are from what x_t tells of them."""
    flow_map, n = exact_map(), 200_000
    x, eps, s_N, t_N = on_path(n, s, t)
    x_t = diffuse(OT, x, eps, t_N[:, None])
    for w, floor in ((eps - x, meanflow), (marginal_velocity(x_t, t_N[:, None]), improved)):
        out, derivative = flow_map.with_tangent(x_t, w, s_N, t_N, labels(n))
        e = flow_map.residual(x_t, eps - x, out, derivative, s_N, t_N)
        assert float(SIGMA_D**2 * e.square().mean()) == pytest.approx(
            floor, rel=0.012
        )  # four times sqrt(2 / n), rounding


def eulerian(**settings):
    settings.setdefault("label_drop", 0.0)
    return Eulerian(EulerianConfig(**settings).resolved("fp32"))


def at_share(a, **settings):
    """At any step: these nets compute in fp64, which has no least one."""
    step = StepConfig(kind="share", start=a, end=a)
    method = eulerian(derivative="difference", step=step, **settings)
    return Eulerian(replace(method.config, step=step))


L2 = ResidualConfig(kind="l2")
APART = TwoTimesConfig(equal=0.0)


def test_the_difference_tends_to_the_tangent_with_slope_one():
    flow_map, data = random_map(), batch()
    tangent = gradient(eulerian(residual=L2, times=APART), flow_map, data)
    errors = []
    for a in (1e-2, 1e-3, 1e-4):
        difference = gradient(at_share(a, residual=L2, times=APART), flow_map, data)
        errors.append(float((difference - tangent).norm() / tangent.norm()))
    assert errors[0] < 0.05
    slopes = -np.diff(np.log10(errors))
    np.testing.assert_allclose(slopes, 1.0, atol=0.1)  # the next order of a


@pytest.mark.parametrize("a", [1.0, 0.1, 1e-4])
@pytest.mark.parametrize(("path", "parameterization"), [(OT, "euler_fm"), (OT, "simple_edm"), (COSINE, "simple_edm")])
def test_consistency_training_with_its_weight_has_the_same_gradient(a, path, parameterization):
    """||f_{s,t}(x_t) - f_{s,r}(x_r)||^2 / ((t - s)(t - r) sd^2), by autograd, over whole batches at any s."""
    flow_map, data = random_map(path, parameterization), batch()
    method = at_share(
        a, residual=L2, times=APART, flow_map=FlowMapConfig(trajectory=path.name, parameterization=parameterization)
    )
    ours = gradient(method, flow_map, data)
    d = method.draw(flow_map, *data[:2], data[2], 7)
    y_t, y_r = flow_map.pair(d.x_t, d.x_r, d.s, d.r, d.t, d.label)
    c_out = flow_map.coefficients(d.s, d.t).c_out.abs()
    loss = ((y_t - y_r).square().flatten(1).sum(1) / (c_out * SIGMA_D * (d.t - d.r))).sum()
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(flow_map.parameters()))])
    assert float((ours - theirs).norm() / theirs.norm()) < (1e-10 if a == 1e-4 else 1e-13) * 10  # eps / a


def test_at_s_equal_to_t_it_is_flow_matching():
    flow_map, data = random_map(), batch()
    method = eulerian(residual=ResidualConfig(kind="l2", mean=True), times=TwoTimesConfig(equal=1.0))
    d = method.draw(flow_map, *data[:2], data[2], 7)
    assert torch.equal(d.s, d.t)
    out = flow_map.average(d.x_t, d.t, d.t, d.label)
    loss = (out - d.v / SIGMA_D).square().mean(dim=(1, 2, 3)).sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(flow_map.parameters()))])
    for kind in (method, at_share(0.1, residual=ResidualConfig(kind="l2", mean=True), times=TwoTimesConfig(equal=1.0))):
        got = gradient(kind, flow_map, data)
        assert float((got - expected).norm() / expected.norm()) < 1e-13
    assert losses(flow_matching(label_drop=0.0), flow_map, *data, 7).loss_G.shape == (16,)


def test_one_jump_to_the_target_is_regression_on_the_path():
    """a = 1: G's target is v / sd whatever s is."""
    flow_map, data = random_map(), batch()
    method = at_share(1.0, residual=L2, times=APART)
    d = method.draw(flow_map, *data[:2], data[2], 7)
    _, e, _ = method._by_difference(flow_map, d, 16)
    out = flow_map.average(d.x_t, d.s, d.t, d.label)
    torch.testing.assert_close(e, (out - d.v / SIGMA_D).detach(), rtol=1e-9, atol=1e-9)


def test_gradients_are_twice_weight_times_residual_times_that_of_the_output():
    """At a = 0.1, where autograd of ||e_a||^2 would have ten times as much; adaptive weights are constants."""
    flow_map, data = random_map(), batch()
    method = at_share(0.1, times=APART)
    d = method.draw(flow_map, *data[:2], data[2], 7)
    out, e, _ = method._by_difference(flow_map, d, 16)
    wt = 1.0 / (e.square().flatten(1).sum(1) + 0.01)
    by_hand = torch.autograd.grad(out, list(flow_map.parameters()), 2.0 * wt[:, None, None, None] * e)
    ours = gradient(method, flow_map, data)
    torch.testing.assert_close(ours, torch.cat([g.flatten() for g in by_hand]), rtol=1e-10, atol=1e-12)
    loss = losses(method, flow_map, *data, 7).loss_G
    torch.testing.assert_close(loss.detach(), (wt * e.square().flatten(1).sum(1)).detach(), rtol=1e-12, atol=0)


# --- what an untrained net's loss is ---


def zero_net_residual(path, parameterization, s, t, n=4000):
    flow_map = random_map(path, parameterization, zero_output=True)
    ordinal = torch.arange(n)
    x = SIGMA_D * rng.normal(3, "x", ordinal, (2, 4, 4)).double()
    eps = SIGMA_D * rng.normal(3, "eps", ordinal, (2, 4, 4)).double()
    s_N, t_N = torch.full((n,), s, dtype=torch.float64), torch.full((n,), t, dtype=torch.float64)
    at = t_N[:, None, None, None]
    x_t, v = diffuse(path, x, eps, at), path.dalpha(at) * x + path.dsigma(at) * eps
    return flow_map.residual(x_t, v, torch.zeros_like(x), torch.zeros_like(x), s_N, t_N)


@pytest.mark.parametrize(
    ("path", "parameterization", "t", "expected"),
    [(OT, "euler_fm", 0.3, 2.0), (OT, "euler_fm", 0.9, 2.0)]
    + [(OT, "simple_edm", t, value) for t, value in ((0.2, 2.163), (0.5, 4.0), (0.8, 2.163))],
)
def test_a_zero_output_layer_has_the_derived_residual(path, parameterization, t, expected):
    """(c' (1 - t) - c)^2 + (c' t + c)^2 with c = (1 - t) / n^2 for `simple_edm` at s = 0: the same at t and 1 - t."""
    e = zero_net_residual(path, parameterization, 0.0, t)
    assert float(e.square().mean()) == pytest.approx(expected, rel=0.016)  # four times 2 sqrt(2 / 128,000)


@pytest.mark.parametrize(("t", "expected"), [(0.2, 0.90), (0.5, 0.50), (0.8, 0.09)])
def test_a_zero_output_layer_has_the_derived_term_of_sct(t, expected):
    """||g||^2 / (sd^2 D) with g = cos(tau) D_tau f."""
    e = zero_net_residual(COSINE, "simple_edm", 0.0, t)
    g = SIGMA_D * math.cos(math.pi * t / 2) / (math.pi / 2) * e
    assert float(g.square().mean()) / SIGMA_D**2 == pytest.approx(expected, abs=0.012)


def test_the_residual_is_that_of_sct_on_the_cosine_path():
    """g = -cos^2 (sd F - dx) - cos sin (x + sd dF), Lu and Song (arXiv 2410.11081)."""
    flow_map, data = random_map(COSINE, "simple_edm"), batch()
    method = eulerian(
        times=TwoTimesConfig(s=None, equal=0.0),
        flow_map=FlowMapConfig(trajectory="vp_cosine", parameterization="simple_edm"),
    )
    d = method.draw(flow_map, *data[:2], data[2], 7)
    out, e, _ = method._by_tangent(flow_map, d, 16)
    _, derivative = flow_map.with_tangent(d.x_t, d.v, d.s, d.t, d.label)
    tau = (math.pi / 2 * d.t)[:, None, None, None]
    dx, dF = d.v / (math.pi / 2), derivative / (math.pi / 2)
    g = -(tau.cos() ** 2) * (SIGMA_D * out - dx) - tau.cos() * tau.sin() * (d.x_t + SIGMA_D * dF)
    factor = SIGMA_D * tau.cos() / (math.pi / 2)
    torch.testing.assert_close(-factor * e, g.detach(), rtol=1e-11, atol=1e-13)


# --- the Euler map, the fixed point of discrete consistency ---


@pytest.mark.parametrize(
    ("step", "t_max", "expected"),
    [
        (lambda t: imm_times.map_r(OT, torch.zeros(1).double(), t, 12), 0.994, 0.9891),
        (lambda t: (t - 1 / 64).clamp_min(0.0), 1.0, 0.9794),
        (lambda t: (t - 1 / 1024).clamp_min(0.0), 1.0, 0.9987),
        (lambda t: torch.where(t > 1e-6, t / 2, 0.0), 1.0, 0.533),
    ],
)
def test_the_fixed_point_of_discrete_consistency_is_the_euler_map(step, t_max, expected):
    """Of Gaussian data with mean 0, iterated: E[x_r | x_t] is an Euler step, so the spread of samples is a product."""
    t, spread = torch.tensor([t_max]).double(), math.sqrt(variance(t_max)) / STD
    while float(t) > 0.0:
        r, at = step(t), float(t)
        slope = -2 * (1 - at) * STD**2 + 2 * at * SIGMA_D**2
        spread *= 1.0 - (at - float(r)) * slope / (2 * variance(at))
        t = r
    assert spread == pytest.approx(expected, abs=5e-4 if expected == 0.533 else 1e-4)


# --- draws ---


@pytest.mark.parametrize("equal", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_shares_in_quarters_are_exact_among_every_four_and_fall_on_every_place(equal):
    group = torch.arange(4000)
    drawn = two_times.draw_equal(equal, group, seed=1).view(-1, 4)
    assert (drawn.sum(1) == round(4 * equal)).all()
    np.testing.assert_allclose(drawn.double().mean(0), equal, atol=4 * 0.5 / math.sqrt(1000))


def test_other_shares_are_met_on_average():
    assert float(two_times.draw_equal(0.4, torch.arange(20_000), 1).double().mean()) == pytest.approx(0.4, abs=0.014)


def test_times_are_functions_of_the_group_alone():
    config = TwoTimesConfig(equal=0.75, equal_t=[-0.2, 1.0], min_gap=1e-4)
    whole = two_times.draw(OT, config, torch.arange(64), 3, 0.0, 1.0)
    for start, stop in ((0, 7), (7, 8), (8, 64)):
        part = two_times.draw(OT, config, torch.arange(start, stop), 3, 0.0, 1.0)
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[start:stop])


def test_logits_of_times_are_normal_and_ordered():
    config = TwoTimesConfig(t=[-0.4, 1.0], s=[-0.4, 1.0], equal=0.5)
    s, t, equal = two_times.draw(OT, config, torch.arange(40_000), 3, 0.0, 1.0)
    assert (s[equal] == t[equal]).all() and (s[~equal] < t[~equal]).all()
    both = torch.logit(torch.cat([s[~equal], t[~equal]]))  # sorted pairs are the same pairs
    assert float(both.mean()) == pytest.approx(-0.4, abs=0.02)
    assert float(both.std()) == pytest.approx(1.0, abs=0.02)


def test_labels_are_dropped_where_s_is_t_alone_at_the_share_of_all():
    flow_map, n = random_map(), 8000
    method = eulerian(label_drop=0.1, label_drop_at="equal")
    ordinal = torch.arange(n)
    d = method.draw(flow_map, torch.zeros(n, 2, 4, 4), ordinal % 3, ordinal, 7)
    dropped = d.label == 3
    assert not dropped[d.s < d.t].any()
    assert float(dropped.double().mean()) == pytest.approx(0.1, abs=4 * 0.3 / math.sqrt(n))


# --- schedules and weights ---


def test_schedules_go_where_their_papers_say():
    progress = torch.tensor([0.0, 0.5, 1.0]).double()
    soflow = share(StepConfig(start=0.1, end=0.002, schedule="exponential"), progress)
    np.testing.assert_allclose(soflow, [0.1, math.sqrt(0.1 * 0.002), 0.002], rtol=1e-12)
    alpha_flow = share(StepConfig(start=1.0, end=0.005, schedule="sigmoid"), progress)
    np.testing.assert_allclose(alpha_flow, [1.0, 0.005 + 0.995 / 2, 0.005], rtol=1e-3)


def test_the_steps_of_easy_consistency_tuning_are_in_noise_levels():
    t = torch.tensor([0.3, 0.6, 0.95]).double()
    config, s = StepConfig(kind="ect", base=2.0, stages=8), torch.zeros(3).double()
    for progress, stage in ((0.0, 0), (0.5, 4), (1.0, 7)):
        r = next_time(OT, config, s, t, torch.full((3,), progress).double(), SIGMA_D)
        sigma = SIGMA_D * (t / (1 - t)).numpy()
        expected = np.maximum(sigma * (1 - 2.0 ** -(stage + 1) * (1 + 8 / (1 + np.exp(sigma)))), 0.0)
        np.testing.assert_allclose(SIGMA_D * (r / (1 - r)).numpy(), expected, rtol=1e-10, atol=1e-14)


def test_the_weight_of_easy_consistency_tuning_is_the_gradient_of_its_loss():
    """(sqrt(||f_t - f_r||^2 + c^2) - c) / (sigma_t - sigma_r), by autograd."""
    flow_map, data = random_map(OT, "simple_edm"), batch()
    method = eulerian(
        derivative="difference",
        step=StepConfig(kind="ect", stages=1),
        residual=ResidualConfig(kind="ect", c=0.03),
        times=TwoTimesConfig(t=[-0.407, 2.0], s=None, equal=0.0),
        flow_map=FlowMapConfig(parameterization="simple_edm"),
    )
    d = method.draw(flow_map, *data[:2], data[2], 7)
    y_t, y_r = flow_map.pair(d.x_t, d.x_r, d.s, d.r, d.t, d.label)
    distance = ((y_t - y_r).square().flatten(1).sum(1) + 0.03**2).sqrt() - 0.03
    loss = (distance / (SIGMA_D * (OT.eta(d.t) - OT.eta(d.r)))).sum()
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(flow_map.parameters()))])
    ours = gradient(method, flow_map, data)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-11


def test_the_weight_of_alpha_flow_is_over_the_distance_to_the_target():
    """Of the loss ||G - G_tgt||^2 / a the weight a / (||G - G_tgt||^2 + c); G - G_tgt = a e."""
    square, a = torch.tensor([0.5, 3.0]).double(), torch.tensor([0.1, 0.7]).double()
    config = ResidualConfig(of_difference=True, c=0.01)
    ones = torch.ones(2).double()
    got = residuals.weights(config, square, 10, OT, ones, ones, a, ones, SIGMA_D)
    np.testing.assert_allclose(got, 1.0 / (a * (square + 0.01 / a**2)), rtol=1e-12)


@pytest.mark.parametrize("equal", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("kind", ["tangent", "mixed", "difference"])
def test_whole_strata_give_the_same_losses_and_gradients_with_fewer_passes(equal, kind):
    """Where micro-batches cut strata every sample has the second pass; where not, only those of s < t."""
    more = {"derivative": "difference"} if kind == "difference" else {"tangent_mix": float(kind == "mixed")}
    step = StepConfig(start=0.1, end=0.1)
    method = eulerian(times=TwoTimesConfig(equal=equal), label_drop=0.1, step=step, **more)
    flow_map = random_map(dropout=0.2, qk_norm=True)
    x, label, ordinal = batch()
    results = []
    for alignment in (1, 8):
        given = Batch(0, x, label, ordinal + 8, torch.ones(16), alignment)
        result = method.loss(flow_map, given, 7)
        gradients = torch.autograd.grad(result.loss_G.sum(), list(flow_map.parameters()))
        results.append((result, torch.cat([g.flatten() for g in gradients])))
    (whole, slope), (split, split_slope) = results
    torch.testing.assert_close(split.loss_G, whole.loss_G, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(split_slope, slope, rtol=1e-9, atol=1e-11)
    for name, values in whole.monitors.items():
        torch.testing.assert_close(split.monitors[name], values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "units"),
    [
        ({}, 3.4),
        ({"tangent_mix": 1.0, "times": TwoTimesConfig(equal=0.5)}, 4.1),
        ({"derivative": "difference", "step": StepConfig(start=0.1, end=0.1)}, 3.25),
    ],
)
def test_a_step_costs_the_forward_units_that_are_counted(settings, units):
    """Multiply-adds of a step on meta tensors, backward included, over those of a forward pass (math attention)."""
    method = eulerian(**settings)
    config = DiTConfig(width=128, depth=4, heads=4, patch_size=2, channels=4, height=16, image_width=16, num_classes=3)
    flow_map, n = FlowMap(DiT(config), OT, "euler_fm", "t_minus_s", SIGMA_D, 1.0, null_label=3), 8
    ordinal = torch.arange(n)

    def counted(work):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    x = torch.zeros(n, 4, 16, 16)
    with torch.no_grad():
        forward = counted(lambda: flow_map.average(x, torch.zeros(n), torch.ones(n), ordinal % 3))
    for alignment in (1, 4):
        batch_ = Batch(0, x, ordinal % 3, ordinal, torch.ones(n), alignment)
        step = counted(lambda batch_=batch_: method.loss(flow_map, batch_, 0).loss_G.sum().backward())
        claimed = method.config.passes_at(alignment).forwards
        assert step / forward == pytest.approx(claimed, abs=0.06)  # attention's share, the first layer without dx
    assert step / forward <= units
    if method.config.derivative == "tangent" and not method.config.tangent_mix:
        # Forward mode multiplies a layer's input by its weight's zero tangent as well: 3 passes beside the value's 3.
        flow_map.model.with_tangent = partial(Backbone.with_tangent, flow_map.model)
        batch_ = Batch(0, x, ordinal % 3, ordinal, torch.ones(n), 1)
        step = counted(lambda: method.loss(flow_map, batch_, 0).loss_G.sum().backward())
        assert 5.0 < step / forward < 6.1


def test_the_tangents_part_grows_with_the_schedule():
    """g = -cos^2 (sd F - dx) - R cos sin (x + sd dF), R from 0 to 1 over the first half."""
    flow_map, data = random_map(COSINE, "simple_edm"), batch()
    settings = {
        "times": TwoTimesConfig(s=None, equal=0.0),
        "flow_map": FlowMapConfig(trajectory="vp_cosine", parameterization="simple_edm"),
    }
    growing = eulerian(residual=ResidualConfig(kind="normalize", warmup=0.5), schedule_images=20, **settings)
    d = growing.draw(flow_map, *data, 7)
    _, e, _ = growing._by_tangent(flow_map, d, 16)
    out, derivative = flow_map.with_tangent(d.x_t, d.v, d.s, d.t, d.label)
    grown = (data[2].double() / 20 / 0.5).clamp_max(1.0)[:, None, None, None]
    assert grown[0] == 0 and grown[-1] == 1
    tau = (math.pi / 2 * d.t)[:, None, None, None]
    dx, d_out = d.v / (math.pi / 2), derivative / (math.pi / 2)
    g = -(tau.cos() ** 2) * (SIGMA_D * out - dx) - grown * tau.cos() * tau.sin() * (d.x_t + SIGMA_D * d_out)
    factor = SIGMA_D * tau.cos() / (math.pi / 2)
    torch.testing.assert_close(-factor * e, g.detach(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": StepConfig(kind="eta")}, "method.step has no meaning"),
        ({"residual": ResidualConfig(kind="ect")}, "weights a difference"),
        ({"residual": ResidualConfig(of_difference=True)}, "weights a difference"),
        ({"derivative": "difference"}, "schedule_images"),
        ({"derivative": "difference", "tangent_mix": 0.5}, "tangent_mix has no meaning"),
        ({"label_drop_at": "equal", "times": TwoTimesConfig(equal=0.05), "label_drop": 0.1}, "times.equal of at least"),
        ({"times": TwoTimesConfig(t=[0.0])}, "times.t"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        EulerianConfig(**settings).validate()


# --- guidance inside training ---


@pytest.mark.parametrize(("omega", "kappa"), [(1.5, 0.0), (0.2, 0.92), (0.5, 0.5), (1.0, 0.5)])
def test_the_guided_velocity_is_the_published_mix(omega, kappa):
    flow_map, (x, label, ordinal) = random_map(), batch()
    config = TrainingGuidanceConfig(omega=omega, kappa=kappa, low=0.1, high=0.75)
    t = torch.linspace(0.01, 0.99, 16).double()
    label = torch.where(ordinal % 5 == 0, 3, label)  # dropped
    v = x.flip(0)
    with torch.no_grad():
        of_label = SIGMA_D * flow_map.average(x, t, t, label)
        of_none = SIGMA_D * flow_map.average(x, t, t, torch.full_like(label, 3))
    expected = omega * v + kappa * of_label + (1 - omega - kappa) * of_none
    guided_here = ((t >= 0.1) & (t <= 0.75) & (ordinal % 5 != 0))[:, None, None, None]
    got = guided(config, flow_map, x, v, t, label, None)
    torch.testing.assert_close(got, torch.where(guided_here, expected, v), rtol=1e-12, atol=1e-13)


def test_soflows_guidance_is_that_mix_and_fades():
    """mu (v + z (W - 1)(v - u_null)) + (1 - mu) u_label, z = 1 - exp(-0.025 d / (1 - d)), d = 5 (1 - t), above 0.8."""
    mu, scale, t = 0.25, 3.0, torch.tensor([0.5, 0.8, 0.9, 0.99, 1.0]).double()
    d = (1 - t[2:4]) / 0.2
    z = torch.cat([torch.ones(2), 1 - torch.exp(-0.025 * d / (1 - d)), torch.zeros(1)]).double()
    torch.testing.assert_close(faded(t, 0.8), z, rtol=1e-12, atol=1e-12)
    flow_map, x, label = random_map(), batch()[0][:5], torch.zeros(5, dtype=torch.int64)
    config = TrainingGuidanceConfig(omega=mu * scale, kappa=1 - mu, fade=0.8)
    v = x.flip(0)
    with torch.no_grad():
        of_label, of_none = flow_map.velocity(x, t, label), flow_map.velocity(x, t, label + 3)
    strength = (z * (scale - 1))[:, None, None, None]
    expected = mu * (v + strength * (v - of_none)) + (1 - mu) * of_label
    got = guided(config, flow_map, x, v, t, label, None)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_differences_follow_the_guided_velocity():
    """On straight lines x_r = x_t - (t - r) v_g, and e is then (G - (1 - a) G_r) / a - v_g / sd."""
    flow_map, (x, label, ordinal) = random_map(), batch()
    guidance = TrainingGuidanceConfig(omega=0.75, kappa=0.75)
    method = at_share(0.1, times=APART, guidance=guidance, label_drop=0.1)
    d = method.draw(flow_map, x, label, ordinal, 7)
    v = guided(guidance, flow_map, d.x_t, d.v, d.t, d.label, None)
    back = 0.1 * (d.t - d.s)
    with torch.no_grad():
        out = flow_map.average(d.x_t, d.s, d.t, d.label)
        out_r = flow_map.average(d.x_t - back[:, None, None, None] * v, d.s, d.t - back, d.label)
    e = (out - 0.9 * out_r) / 0.1 - v / SIGMA_D
    result = method.loss(flow_map, Batch(0, x, label, ordinal, torch.ones(16)), 7)
    torch.testing.assert_close(result.monitors["residual"], e.square().mean(dim=(1, 2, 3)), rtol=1e-8, atol=0)


def test_guidance_needs_dropped_labels():
    with pytest.raises(UserError, match="label_drop"):
        EulerianConfig(guidance=TrainingGuidanceConfig(kappa=0.5), label_drop=0.0).validate()
