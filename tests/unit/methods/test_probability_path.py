"""Trajectories and DDIM (imm.md section 1) against mpmath at 50 digits."""

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imm_scale.errors import UserError
from imm_scale.methods import probability_path
from imm_scale.methods.probability_path import OTFlowMatching, VPCosine

mp.mp.dps = 60  # one number in all tests: it is global
properties = settings(max_examples=80, deadline=None)
# A handful of roundings, each 1.1e-16 relative; at t = 0.999 alpha = 1 - t or cos(pi t / 2) has lost three digits.
FP64 = 1e-12
inner_times = st.floats(1e-9, 0.999)


def ot_alpha(t):
    return 1 - t


def ot_sigma(t):
    return t


def cosine_alpha(t):
    return mp.cos(mp.pi * t / 2)


def cosine_sigma(t):
    return mp.sin(mp.pi * t / 2)


REFERENCES = {"ot_fm": (ot_alpha, ot_sigma), "vp_cosine": (cosine_alpha, cosine_sigma)}
both = pytest.mark.parametrize("interp", [OTFlowMatching(), VPCosine()], ids=lambda i: i.name)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(value, expected, relative=FP64):
    return abs(mp.mpf(value.item()) - expected) <= relative * abs(expected)


@both
@properties
@given(t=inner_times)
def test_alpha_sigma_eta_log_snr_and_norm_are_the_textbook_ones(interp, t):
    alpha, sigma = (f(mp.mpf(t)) for f in REFERENCES[interp.name])
    at = tensor(t)
    assert close(interp.alpha(at), alpha)
    assert close(interp.sigma(at), sigma)
    assert close(interp.eta(at), sigma / alpha)
    assert close(tensor(interp.eta_at(t)), sigma / alpha)
    # log-SNR passes through 0: its error is absolute, that of the relative error of eta.
    assert abs(mp.mpf(interp.log_snr(at).item()) - 2 * mp.log(alpha / sigma)) < FP64 * 10
    assert close(interp.norm(at), mp.sqrt(alpha**2 + sigma**2))


@both
@properties
@given(t=st.floats(1e-6, 0.999))
def test_dlog_snr_dt_is_the_derivative_of_log_snr(interp, t):
    alpha, sigma = REFERENCES[interp.name]
    derivative = mp.diff(lambda u: 2 * mp.log(alpha(u) / sigma(u)), mp.mpf(t))
    assert close(interp.dlog_snr_dt(tensor(t)), derivative)


@both
def test_dlog_snr_dt_agrees_with_finite_differences_of_the_code_itself(interp):
    t, h = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-5
    difference = (interp.log_snr(t + h) - interp.log_snr(t - h)) / (2 * h)
    # Central difference: h^2 / 6 times the third derivative, below 3e4 here.
    torch.testing.assert_close(interp.dlog_snr_dt(t), difference, rtol=1e-6, atol=0)


def test_dlog_snr_dt_matches_the_table_of_the_specification():
    t = tensor(0.1, 0.37, 0.8)
    torch.testing.assert_close(OTFlowMatching().dlog_snr_dt(t), -2 / (t * (1 - t)), rtol=FP64, atol=0)
    torch.testing.assert_close(VPCosine().dlog_snr_dt(t), -2 * math.pi / torch.sin(math.pi * t), rtol=FP64, atol=0)


@both
@properties
@given(t=inner_times)
def test_eta_and_log_snr_invert(interp, t):
    at = tensor(t)
    # d(log eta) = dt / (t (1 - t)) or so: relative errors of eta shrink on the way back.
    torch.testing.assert_close(interp.eta_inverse(interp.eta(at)), at, rtol=FP64, atol=0)
    torch.testing.assert_close(interp.log_snr_inverse(interp.log_snr(at)), at, rtol=FP64 * 10, atol=0)


@properties
@given(eta=st.floats(1e-12, 1e6))
def test_eta_inverse_is_the_formula_of_the_table(eta):
    e = mp.mpf(eta)
    assert close(OTFlowMatching().eta_inverse(tensor(eta)), e / (1 + e))
    assert close(VPCosine().eta_inverse(tensor(eta)), 2 / mp.pi * mp.atan(e))


@both
def test_eta_inverse_holds_at_both_ends(interp):
    assert interp.eta_at(0.0) == 0.0
    assert interp.eta_at(1.0) == interp.eta(tensor(1.0)).item(), "infinite, or 1.6e16 by the rounding of pi"
    ends = interp.eta_inverse(tensor(0.0, math.inf))
    assert ends[0] == 0.0
    assert ends[1] == 1.0, "t = 1 is a legal time and eta there is infinite"


def test_eta_at_the_last_times_of_the_recipes():
    assert OTFlowMatching().eta(tensor(0.994)).item() == pytest.approx(165.67, abs=0.005)  # two printed decimals
    assert VPCosine().eta(tensor(0.996)).item() == pytest.approx(159.15, abs=0.005)


@both
def test_ends_of_the_trajectory_are_data_and_prior(interp):
    ends = tensor(0.0, 1.0)
    # cos(pi / 2) in fp64 is 6e-17
    torch.testing.assert_close(interp.alpha(ends), tensor(1.0, 0.0), rtol=0, atol=1e-16)
    torch.testing.assert_close(interp.sigma(ends), tensor(0.0, 1.0), rtol=0, atol=1e-16)


@both
@properties
@given(t=st.floats(1e-6, 1.0), exponent=st.floats(-12, 0))
def test_determinant_keeps_its_digits_where_s_is_close_to_t(interp, t, exponent):
    s = max(0.0, t - 10**exponent)
    alpha, sigma = REFERENCES[interp.name]
    s_, t_ = mp.mpf(s), mp.mpf(t)
    expected = alpha(s_) * sigma(t_) - sigma(s_) * alpha(t_)
    determinant = interp.determinant(tensor(s), tensor(t))
    assert close(determinant, expected)


def ddim_reference(name, x_t, x, s, t):
    """Equation 11, letter for letter, in mpmath."""
    alpha, sigma = REFERENCES[name]
    s, t = mp.mpf(s), mp.mpf(t)
    ratio = sigma(s) / sigma(t)
    return [(alpha(s) - alpha(t) * ratio) * mp.mpf(b) + ratio * mp.mpf(a) for a, b in zip(x_t, x, strict=True)]


@both
@properties
@given(data=st.data(), t=st.floats(1e-6, 1.0))
def test_ddim_is_equation_11_from_t_to_s(interp, data, t):
    s = data.draw(st.floats(0.0, t, allow_subnormal=False))
    values = data.draw(st.lists(st.floats(-3, 3), min_size=4, max_size=4))
    x_t, x = values[:2], values[2:]
    x_s = probability_path.ddim(interp, tensor(*x_t), tensor(*x), tensor(s), tensor(t))
    for a, b in zip(x_s, ddim_reference(interp.name, x_t, x, s, t), strict=True):
        assert abs(mp.mpf(a.item()) - b) < FP64 * 6  # both coefficients are in [0, 1], the values up to 3


@both
@properties
@given(times=st.tuples(*[st.floats(0.0, 1.0, allow_subnormal=False)] * 3))
def test_ddim_is_self_consistent(interp, times):
    s, r, t = sorted(times)
    if r == 0.0:
        return
    generator = torch.Generator().manual_seed(0)
    x_t, x = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    s, r, t = tensor(s), tensor(r), tensor(t)
    x_r = probability_path.ddim(interp, x_t, x, r, t)
    via_r = probability_path.ddim(interp, x_r, x, s, r)
    torch.testing.assert_close(via_r, probability_path.ddim(interp, x_t, x, s, t), rtol=0, atol=FP64)


@both
@properties
@given(t=st.floats(1e-3, 1.0), share=st.floats(0.0, 1.0))
def test_ddim_with_the_true_x_keeps_the_noise(interp, t, share):
    generator = torch.Generator().manual_seed(1)
    x, eps = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    t, s = tensor(t), tensor(t * share)
    x_t = probability_path.diffuse(interp, x, eps, t)
    # the rounding of x_t, 1e-16, times sigma_s / sigma_t <= 1
    expected = interp.alpha(s) * x + interp.sigma(s) * eps
    torch.testing.assert_close(probability_path.ddim(interp, x_t, x, s, t), expected, rtol=0, atol=FP64)


@both
def test_ddim_to_time_0_is_the_clean_sample_and_to_its_own_time_the_identity(interp):
    x_t, x, t = tensor(0.3, -2.0), tensor(1.5, 0.25), tensor(0.7)
    torch.testing.assert_close(probability_path.ddim(interp, x_t, x, tensor(0.0), t), x, rtol=1e-15, atol=0)
    torch.testing.assert_close(probability_path.ddim(interp, x_t, x, t, t), x_t, rtol=1e-15, atol=0)


@both
def test_diffuse_is_alpha_x_plus_sigma_eps(interp):
    alpha, sigma = (float(f(mp.mpf("0.3"))) for f in REFERENCES[interp.name])
    x, eps = np.array([1.0, -2.0, 0.5]), np.array([0.25, 4.0, -1.0])
    x_t = probability_path.diffuse(interp, torch.from_numpy(x), torch.from_numpy(eps), tensor(0.3))
    np.testing.assert_allclose(x_t.numpy(), alpha * x + sigma * eps, rtol=1e-14)


@both
def test_samples_keep_their_dtype_though_times_are_fp64(interp):
    x = torch.ones(4, dtype=torch.float32)
    assert probability_path.diffuse(interp, x, x, tensor(0.5)).dtype == torch.float32
    assert probability_path.ddim(interp, x, x, tensor(0.2), tensor(0.5)).dtype == torch.float32


def test_trajectories_are_built_by_name_and_an_unknown_one_is_refused_with_the_choice():
    for name in ("ot_fm", "vp_cosine"):
        assert probability_path.build(name).name == name
    with pytest.raises(UserError, match=r"'vp_linear'.*ot_fm, vp_cosine"):
        probability_path.build("vp_linear")
