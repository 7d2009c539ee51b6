"""The map f_{s,t} (imm.md section 2) against mpmath, and its identities for arbitrary networks."""

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from imm_scale.errors import UserError
from imm_scale.methods import flow_map
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.flow_matching import FlowMatchingConfig
from imm_scale.methods.probability_path import OTFlowMatching, VPCosine, ddim, ddpm_step, diffuse
from imm_scale.models.base import Backbone

mp.mp.dps = 60  # one number in all tests: it is global
properties = settings(max_examples=60, deadline=None)
OT, COSINE = OTFlowMatching(), VPCosine()
LEGAL = [
    (OT, "identity"),
    (OT, "simple_edm"),
    (OT, "euler_fm"),
    (COSINE, "identity"),
    (COSINE, "simple_edm"),
]
legal = pytest.mark.parametrize(("interp", "parameterization"), LEGAL, ids=[f"{i.name}-{p}" for i, p in LEGAL])
FP64 = 1e-12  # some ten roundings of 1.1e-16, three digits lost by alpha towards t = 1
SIGMA_D = 0.5


def tensor(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def alpha_sigma(name, t):
    t = mp.mpf(t)
    return (1 - t, t) if name == "ot_fm" else (mp.cos(mp.pi * t / 2), mp.sin(mp.pi * t / 2))


def reference(name, parameterization, s, t, sigma_d):
    """c_in, c_skip, c_out as printed in the table, cancellations and all, at 60 digits."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_sigma(name, s), alpha_sigma(name, t)
    norm, sigma_d = mp.sqrt(alpha_t**2 + sigma_t**2), mp.mpf(sigma_d)
    c_in = 1 / (sigma_d * norm)
    if parameterization == "identity":
        return c_in, sigma_s / sigma_t, alpha_s - alpha_t * sigma_s / sigma_t
    if parameterization == "simple_edm":
        c_skip = (alpha_s * alpha_t + sigma_s * sigma_t) / norm**2
        return c_in, c_skip, -sigma_d * (alpha_s * sigma_t - sigma_s * alpha_t) / norm
    return c_in, mp.mpf(1), -sigma_d * (mp.mpf(t) - mp.mpf(s))


def pairs_of_times(first):
    """s <= t, anywhere and within 1e-12 of each other."""
    anywhere = st.tuples(st.floats(0.0, 1.0, allow_subnormal=False), st.floats(first, 1.0)).map(
        lambda p: (p[0] * p[1], p[1])
    )
    near = st.tuples(st.floats(first, 1.0), st.floats(-12, -1)).map(lambda p: (max(0.0, p[0] - 10 ** p[1]), p[0]))
    ends = st.sampled_from([(0.0, 1.0), (0.0, 0.994), (0.994, 0.994), (0.0, first), (first, first), (1.0, 1.0)])
    return st.one_of(anywhere, near, ends)


@legal
@properties
@given(times=pairs_of_times(1e-9), sigma_d=st.sampled_from([0.5, 1.0, 0.25]))
def test_coefficients_agree_with_the_printed_formulas_in_fp64(interp, parameterization, times, sigma_d):
    coefficients = flow_map.coefficients(interp, parameterization, tensor(times[0]), tensor(times[1]), sigma_d)
    expected = reference(interp.name, parameterization, *times, sigma_d)
    for name, a, b in zip(("c_in", "c_skip", "c_out"), coefficients, expected, strict=True):
        # c_skip of simple_edm at (0, 1) is cos(pi / 2): 6e-17 in fp64, hence the floor at the scale of 1.
        assert abs(mp.mpf(a.item()) - b) <= FP64 * abs(b) + mp.mpf("2e-16"), name
    if times[1] > times[0]:
        c_out = mp.mpf(coefficients.c_out.item())
        assert abs(c_out - expected[2]) <= FP64 * abs(expected[2]), "c_out keeps its digits where s is close to t"


@legal
@properties
@given(times=pairs_of_times(1e-6))
def test_coefficients_agree_with_the_printed_formulas_in_fp32(interp, parameterization, times):
    s, t = (tensor(u, dtype=torch.float32) for u in times)
    coefficients = flow_map.coefficients(interp, parameterization, s, t, SIGMA_D)
    expected = reference(interp.name, parameterization, s.item(), t.item(), SIGMA_D)
    assert all(c.dtype == torch.float32 for c in coefficients)
    # Ten roundings of 6e-8. c_in and c_skip on the scale of 1; c_out, which vanishes at s = t, on its own.
    assert abs(mp.mpf(coefficients.c_in.item()) - expected[0]) <= 1e-6 * expected[0]
    assert abs(mp.mpf(coefficients.c_skip.item()) - expected[1]) <= 1e-6
    assert abs(mp.mpf(coefficients.c_out.item()) - expected[2]) <= 1e-6 * abs(expected[2]) + mp.mpf("1e-50")


@pytest.mark.parametrize("interp", [OT, COSINE], ids=lambda i: i.name)
def test_identity_parameterization_at_the_data_end_is_the_identity_map(interp):
    c = flow_map.coefficients(interp, "identity", tensor(0.0, 0.0), tensor(0.0, 0.5), SIGMA_D)
    assert (c.c_skip[0], c.c_out[0]) == (1.0, 0.0)
    assert (c.c_skip[1], c.c_out[1]) == (0.0, 1.0), "a neighbour in the batch is not disturbed"


def test_closed_forms_of_the_numerics_section():
    s, t = tensor(0.2), tensor(0.7)
    sin = torch.sin
    expected = {
        (OT, "identity"): (t - s) / t,
        (COSINE, "identity"): sin(torch.pi * (t - s) / 2) / sin(torch.pi * t / 2),
        (OT, "simple_edm"): -0.5 * (t - s) / torch.sqrt((1 - t) ** 2 + t**2),
        (COSINE, "simple_edm"): -0.5 * sin(torch.pi * (t - s) / 2),
        (OT, "euler_fm"): -0.5 * (t - s),
    }
    for (interp, parameterization), value in expected.items():
        c_out = flow_map.coefficients(interp, parameterization, s, t, 0.5).c_out
        torch.testing.assert_close(c_out, value, rtol=FP64, atol=0)


class Spy(Backbone):
    """Answers with a fixed function of its inputs and remembers every call."""

    def __init__(self, answer=None, dtype=torch.float64):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.answer = answer or (lambda x, *_: torch.sin(3 * x))
        self.calls = []

    def forward(self, x, c_noise, second, label, dropout_key=None):
        self.calls.append((x, c_noise, second, label, dropout_key, torch.is_grad_enabled()))
        return self.scale * self.answer(x, c_noise, second, label)


def particles(n=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 3, 3, generator=generator, dtype=torch.float64).to(dtype)


LABELS = torch.arange(6)


@pytest.mark.parametrize(("interp", "parameterization"), [(i, p) for i, p in LEGAL if p != "identity"])
@properties
@given(s=st.floats(0.0, 1.0, allow_subnormal=False))
def test_f_from_s_to_s_is_the_identity_whatever_the_network(interp, parameterization, s):
    net = Spy(lambda x, *_: 1e3 * torch.sin(7 * x) + 100)
    x = particles()
    y = FlowMap(net, interp, parameterization)(x, tensor(s), tensor(s), LABELS)
    torch.testing.assert_close(y, x, rtol=1e-15 * 4, atol=0)  # (alpha^2 + sigma^2) / norm^2 is 1 to two roundings


@legal
@properties
@given(times=pairs_of_times(1e-3))
def test_exact_target_makes_f_exact_for_every_s(interp, parameterization, times):
    s, t = tensor(times[0]), tensor(times[1])
    x, eps = particles(), 0.5 * particles(seed=1)
    target = flow_map.exact_target(interp, parameterization, x, eps, t, SIGMA_D)
    x_t = diffuse(interp, x, eps, t)
    f = FlowMap(Spy(lambda *_: target), interp, parameterization, sigma_data=SIGMA_D)
    # x_s in its division-free form; values up to 5, coefficients up to 1
    expected = interp.alpha(s) * x + interp.sigma(s) * eps
    torch.testing.assert_close(f(x_t, s, t, LABELS), expected, rtol=0, atol=1e-11 * 5)
    torch.testing.assert_close(f(x_t, s, t, LABELS), ddim(interp, x_t, x, s, t), rtol=0, atol=1e-11 * 5)


@pytest.mark.parametrize(("interp", "parameterization"), [(i, p) for i, p in LEGAL if p != "identity"])
def test_r_equal_s_makes_the_target_the_exact_noisy_x_s(interp, parameterization):
    s, t = tensor(0.3, 0.0), tensor(0.8, 0.6)
    x, eps = particles(), 0.5 * particles(seed=1)
    wide_s, wide_t = (u.repeat_interleave(3).view(-1, 1, 1, 1) for u in (s, t))
    x_t, x_s = diffuse(interp, x, eps, wide_t), diffuse(interp, x, eps, wide_s)
    _, y_r = FlowMap(Spy(), interp, parameterization).pair(x_t, x_s, s, s, t, LABELS)
    torch.testing.assert_close(y_r, ddim(interp, x_t, x, wide_s, wide_t), rtol=0, atol=FP64)
    torch.testing.assert_close(y_r[3:], x[3:], rtol=0, atol=FP64)  # s = 0: the clean sample


@legal
def test_forward_is_c_skip_x_plus_c_out_g_with_times_shared_inside_groups(interp, parameterization):
    s, t = [0.1, 0.35], [0.9, 0.36]
    x = particles()
    net = Spy(lambda x, c, u, label: torch.sin(x) + label.view(-1, 1, 1, 1))
    y = FlowMap(net, interp, parameterization, sigma_data=0.4)(x, tensor(*s), tensor(*t), LABELS)
    y = y.detach().numpy()
    for n in range(6):
        group = n // 3
        c_in, c_skip, c_out = (
            float(c) for c in reference(interp.name, parameterization, s[group], t[group], sigma_d="0.4")
        )
        sample = x[n].numpy()
        np.testing.assert_allclose(
            y[n], c_skip * sample + c_out * (np.sin(c_in * sample) + n), rtol=0, atol=1e-11, err_msg=f"sample {n}"
        )


@pytest.mark.parametrize(
    ("second_time", "second"),
    [("s", lambda s, t: 1000 * s), ("t_minus_s", lambda s, t: 1000 * (t - s)), ("none", lambda s, t: None)],
)
def test_the_network_is_told_1000_t_and_the_second_time(second_time, second):
    net = Spy()
    f = FlowMap(net, OT, "euler_fm", second_time)
    s, r, t = tensor(0.25, 0.0), tensor(0.5, 0.994 - 1.4e-6), tensor(0.75, 0.994)
    f.pair(particles(), particles(), s, r, t, LABELS)
    f(particles(), s, t, LABELS)
    f.average(particles(), t, t, LABELS)
    for call, (a, b) in zip(net.calls, [(s, r), (s, t), (s, t), (t, t)], strict=True):
        assert call[1].dtype == torch.float64, "rounded to fp32, 1000 t and 1000 r lose their difference"
        assert torch.equal(call[1], 1000 * b)
        expected = second(a, b)
        assert (call[2] is None) if expected is None else torch.equal(call[2], expected)


def test_time_scale_replaces_the_1000():
    net = Spy()
    FlowMap(net, OT, "euler_fm", "s", time_scale=2.0)(particles(), tensor(0.25), tensor(0.5), LABELS)
    assert (net.calls[0][1].item(), net.calls[0][2].item()) == (1.0, 0.5)


@pytest.mark.parametrize("interp", [OT, COSINE], ids=lambda i: i.name)
def test_c_in_gives_the_network_inputs_of_unit_variance(interp):
    net, generator = Spy(), torch.Generator().manual_seed(3)
    x, eps = 0.5 * torch.randn(2, 9, 40_000, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.0, 1.0, 9, dtype=torch.float64)
    x_t = diffuse(interp, x, eps, t[:, None])
    FlowMap(net, interp, "simple_edm")(x_t, 0 * t, t, torch.zeros(9, dtype=torch.long))
    # std of 40,000 normals: 1 within 1 / sqrt(80,000), at 4.5 standard errors
    assert (net.calls[0][0].std(dim=1) - 1).abs().max() < 4.5 / 80_000**0.5


@legal
def test_pair_equals_two_calls_and_only_the_later_time_has_a_gradient(interp, parameterization):
    net = Spy()
    f = FlowMap(net, interp, parameterization)
    x_t, x_r = particles(), particles(seed=1)
    s, r, t = tensor(0.1, 0.3), tensor(0.4, 0.3), tensor(0.5, 0.9)
    y_t, y_r = f.pair(x_t, x_r, s, r, t, LABELS)
    assert y_t.requires_grad
    assert not y_r.requires_grad
    assert [call[5] for call in net.calls] == [False, True]
    assert torch.equal(y_t, f(x_t, s, t, LABELS))
    assert torch.equal(y_r, f(x_r, s, r, LABELS))


def test_average_is_the_network_with_its_input_scaled():
    net, x, t = Spy(), particles(), tensor(0.2, 0.7)
    got = FlowMap(net, COSINE, "simple_edm").average(x, t, t, LABELS)
    c_in = 1 / SIGMA_D  # on a variance-preserving trajectory
    torch.testing.assert_close(got, torch.sin(3 * c_in * x), rtol=FP64, atol=FP64)


def guided(dtype=torch.float64, null_label=9):
    net = Spy(lambda x, c, u, label: (torch.cos(x) + label.view(-1, 1, 1, 1)).to(dtype), dtype=dtype)
    return net, FlowMap(net, OT, "euler_fm", null_label=null_label)


@pytest.mark.parametrize("w", [0.0, 1.0, 1.5, 3.0])
def test_guidance_replaces_g_by_w_g_label_plus_1_minus_w_g_null(w):
    _, f = guided()
    x, s, t = particles(), tensor(0.25), tensor(0.75)
    y = f(x, s, t, LABELS, guidance_scale=w)
    g = np.cos(x.numpy() / (0.5 * np.sqrt(0.25**2 + 0.75**2)))
    label = np.arange(6).reshape(-1, 1, 1, 1)
    expected = x.numpy() - 0.5 * 0.5 * (w * (g + label) + (1 - w) * (g + 9))
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=0, atol=FP64 * 10)


def test_guidance_of_1_costs_no_second_pass_and_without_a_null_label_guidance_is_refused():
    net, f = guided()
    f(particles(), tensor(0.0), tensor(1.0), LABELS, guidance_scale=1.0)
    assert len(net.calls) == 1
    _, f = guided(null_label=None)
    with pytest.raises(UserError, match=r"guidance_scale=1\.5.*guidance_scale=1"):
        f(particles(), tensor(0.0), tensor(1.0), LABELS, guidance_scale=1.5)


@pytest.mark.parametrize("w", [1.0, 2.5])
def test_a_16_bit_network_is_put_together_in_the_precision_of_the_samples(w):
    """Section 3, numerics: y and coefficients in fp32 or better whatever the network runs in."""
    net, f = guided(dtype=torch.bfloat16)
    x, s, t = particles(), tensor(0.25, 0.5), tensor(0.75, 0.994)
    y = f(x, s, t, LABELS, guidance_scale=w)
    assert y.dtype == torch.float64
    assert all(call[0].dtype == torch.bfloat16 for call in net.calls), "the network has its own precision"
    scaled = net.calls[0][0]
    with_label, null = net(scaled, None, None, LABELS), net(scaled, None, None, torch.full((6,), 9))
    g = w * with_label.double() + (1 - w) * null.double()
    wide = (t - s).repeat_interleave(3).view(-1, 1, 1, 1)
    torch.testing.assert_close(y, x - 0.5 * wide * g, rtol=0, atol=FP64 * 10)


def test_unknown_or_mismatched_settings_are_refused_with_the_remedy():
    with pytest.raises(UserError, match=r"'edm'.*identity, simple_edm, euler_fm"):
        FlowMap(Spy(), OT, "edm")
    with pytest.raises(UserError, match=r"'r'.*s, t_minus_s"):
        FlowMap(Spy(), OT, "euler_fm", "r")
    for call in (
        lambda: FlowMap(Spy(), COSINE, "euler_fm"),
        lambda: flow_map.coefficients(COSINE, "euler_fm", tensor(0.1), tensor(0.2), 0.5),
    ):
        with pytest.raises(UserError, match=r"'vp_cosine'.*simple_edm"):
            call()


# What nets trained elsewhere predict


@properties
@given(times=pairs_of_times(1e-9), sigma_d=st.sampled_from([0.5, 1.0]))
def test_velocity_is_euler_fm_of_samples_that_are_only_divided_by_sigma_d(times, sigma_d):
    s, t = tensor(times[0]), tensor(times[1])
    ours = flow_map.coefficients(OT, "velocity", s, t, sigma_d)
    assert ours.c_in.item() == 1 / sigma_d
    assert ours[1:] == flow_map.coefficients(OT, "euler_fm", s, t, sigma_d)[1:]


@pytest.mark.parametrize("interp", [OT, COSINE], ids=lambda i: i.name)
@properties
@given(u=st.tuples(st.floats(0.0, 1.0, allow_subnormal=False), st.floats(1e-6, 0.999)))
def test_epsilon_takes_the_noise_out_and_puts_that_of_s_in(interp, u):
    s, t = u[0] * u[1], u[1]
    got = flow_map.coefficients(interp, "epsilon", tensor(s), tensor(t), SIGMA_D)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_sigma(interp.name, s), alpha_sigma(interp.name, t)
    # alpha_s (x - sigma_t e) / alpha_t + sigma_s e, collected in x and e = sigma_d G
    expected = (alpha_s / alpha_t, SIGMA_D * (sigma_s - alpha_s * sigma_t / alpha_t))
    for value, printed in zip(got[1:], expected, strict=True):
        assert abs(mp.mpf(value.item()) - printed) <= FP64 * abs(printed) + mp.mpf("1e-300")
    x, eps = particles(), 0.5 * particles(seed=1)
    target = flow_map.exact_target(interp, "epsilon", x, eps, tensor(t), SIGMA_D)
    x_t = diffuse(interp, x, eps, tensor(t))
    y = FlowMap(Spy(lambda *_: target), interp, "epsilon", sigma_data=SIGMA_D)(x_t, tensor(s), tensor(t), LABELS)
    # Errors of 1e-16 over alpha_t, at least 1e-3
    torch.testing.assert_close(y, diffuse(interp, x, eps, tensor(s)), rtol=0, atol=1e-11)


def test_velocity_needs_straight_lines_and_epsilon_some_data():
    with pytest.raises(UserError, match=r"'velocity' needs trajectory 'ot_fm'.*simple_edm"):
        FlowMap(Spy(), COSINE, "velocity")
    settings = flow_map.FlowMapConfig(parameterization="epsilon")
    FlowMatchingConfig(flow_map=settings, t_max=0.99).validate()
    for t_max in (1.0, None):
        with pytest.raises(UserError, match=r"method.t_max=0.994"):
            FlowMatchingConfig(flow_map=settings, t_max=t_max).validate()


@pytest.mark.parametrize("interp", [OT, COSINE], ids=lambda i: i.name)
def test_ddpm_steps_are_those_of_as_much_noise(interp):
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    steps = np.array([0, 1, 2, 10, 499, 500, 998, 999])
    ratio = np.sqrt(1 / alpha_bar[steps] - 1)
    t = interp.eta_inverse(torch.from_numpy(ratio))
    # log alpha-bar differs by 1e-4 and more from step to step; at the end t is known to 1e-16 / (1 - t) = 2e-14
    np.testing.assert_allclose(ddpm_step(interp, t).numpy(), steps, rtol=0, atol=1e-8)
    between = np.sqrt(1 / np.sqrt(alpha_bar[300] * alpha_bar[301]) - 1)
    t = interp.eta_inverse(tensor(0.0, between, 1e4, 1e9))
    np.testing.assert_allclose(ddpm_step(interp, t).numpy(), [-1, 300.5, 999, 999], rtol=0, atol=1e-8)
    assert ddpm_step(interp, tensor(1.0)).item() == pytest.approx(999, abs=1e-8), "where the ratio is infinite"
    ordered = ddpm_step(interp, torch.linspace(0, 1, 10_001, dtype=torch.float64))
    assert (ordered.diff() >= 0).all()


@pytest.mark.parametrize("second_time", ["s", "t_minus_s", "none"])
def test_the_network_can_be_told_ddpm_steps(second_time):
    net = Spy()
    f = FlowMap(net, OT, "epsilon", second_time, time_scale=2.0, time_input="ddpm_step")
    s, t = tensor(0.25, 0.1), tensor(0.5, 0.9)
    f(particles(), s, t, LABELS)
    at_s, at_t = ddpm_step(OT, s), ddpm_step(OT, t)
    _, c_noise, second, *_ = net.calls[0]
    torch.testing.assert_close(c_noise, 2 * at_t, rtol=1e-15, atol=0)
    expected = {"s": 2 * at_s, "t_minus_s": 2 * (at_t - at_s), "none": None}[second_time]
    assert (second is None) == (expected is None)
    if expected is not None:
        torch.testing.assert_close(second, expected, rtol=1e-15, atol=0)
