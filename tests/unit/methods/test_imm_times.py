"""p(t), p(s | t), r(s, t) and w(s, t) (imm.md section 3) against scalar mpmath references and the published numbers."""

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imm_scale.errors import UserError
from imm_scale.methods import imm_times
from imm_scale.methods.probability_path import OTFlowMatching, VPCosine

mp.mp.dps = 60  # one number in all tests: it is global
properties = settings(max_examples=100, deadline=None)
OT, COSINE = OTFlowMatching(), VPCosine()
T_MAX = {"ot_fm": 0.994, "vp_cosine": 0.996}
both = pytest.mark.parametrize("interp", [OT, COSINE], ids=lambda i: i.name)
every_mapping = pytest.mark.parametrize("mapping", ["eta", "t", "log_snr", "inverse_eta"])


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def eta(name, t):
    t = mp.mpf(t)
    if name == "ot_fm":
        return t / (1 - t) if t < 1 else mp.inf
    return mp.tan(mp.pi * t / 2)


def eta_inverse(name, e):
    if name == "ot_fm":
        return e / (1 + e) if mp.isfinite(e) else mp.mpf(1)
    return 2 / mp.pi * mp.atan(e)


def log_snr(name, t):
    return -2 * mp.log(eta(name, t))


def map_r_reference(name, s, t, k, gap, mapping):
    """One scalar at a time, letter for letter from section 3 item 3 and appendix C.6."""
    t_, step = mp.mpf(t), mp.mpf(2) ** -k
    if t == 0.0:
        return mp.mpf(0)
    if mapping == "eta":
        decremented = eta(name, t) - (160 - 0) * step
        r = eta_inverse(name, decremented if decremented > 0 else mp.mpf(0))
    elif mapping == "t":
        r = t_ - step
    elif mapping == "log_snr":
        span = log_snr(name, "0.001") - log_snr(name, str(T_MAX[name]))
        r = eta_inverse(name, mp.exp(-(log_snr(name, t) + span * step) / 2))
    else:
        span = 1 / eta(name, "0.005") - (1 / eta(name, 1) if name == "ot_fm" else 0)
        r = eta_inverse(name, 1 / (1 / eta(name, t) + span * step))
    return max(mp.mpf(s), min(t_ - mp.mpf(gap), r))


def times_of(name):
    """(s, t) with s <= t <= T: anywhere, close together, at the ends."""
    last = T_MAX[name]
    anywhere = st.tuples(st.floats(0, 1, allow_subnormal=False), st.floats(1e-9, last)).map(
        lambda p: (p[0] * p[1], p[1])
    )
    near = st.tuples(st.floats(1e-6, last), st.floats(-12, -2)).map(lambda p: (max(0.0, p[0] - 10 ** p[1]), p[0]))
    ends = st.sampled_from([(0.0, last), (last, last), (0.0, 0.0), (0.0, 1e-9), (0.5, last)])
    return st.one_of(anywhere, near, ends)


@both
@every_mapping
@properties
@given(data=st.data(), k=st.integers(0, 16), gap=st.sampled_from([0.0, 1e-4, 1e-2]))
def test_r_is_the_scalar_formula_and_lies_between_s_and_t(interp, mapping, data, k, gap):
    s, t = data.draw(times_of(interp.name))
    r = imm_times.map_r(interp, tensor(s), tensor(t), k, gap, mapping).item()
    assert s <= r <= t
    # Roundings of eta up to 166 shrink by dt/d eta = (1 - t)^2; what is left is the rounding of times up to 1.
    assert abs(mp.mpf(r) - map_r_reference(interp.name, s, t, k, gap, mapping)) < 1e-14
    if t - s < gap:
        assert r == s


@both
@every_mapping
def test_r_of_a_batch_is_r_of_each(interp, mapping):
    t = torch.linspace(0.0, T_MAX[interp.name], 50, dtype=torch.float64)
    s = t * torch.linspace(0.0, 1.0, 50, dtype=torch.float64).flip(0)
    together = imm_times.map_r(interp, s, t, 12, 1e-4, mapping)
    alone = torch.cat([imm_times.map_r(interp, s[i : i + 1], t[i : i + 1], 12, 1e-4, mapping) for i in range(50)])
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, alone, rtol=1e-14, atol=0)


@both
@every_mapping
@pytest.mark.parametrize("k", [0, 4, 7, 8, 12, 20, 40])
def test_r_stays_between_s_and_t_on_a_dense_grid_even_for_absurd_steps(interp, mapping, k):
    t = torch.linspace(0.0, T_MAX[interp.name], 401, dtype=torch.float64)[:, None]
    s = t * torch.linspace(0.0, 1.0, 41, dtype=torch.float64)
    t = t.expand_as(s)
    for gap in (0.0, 1e-4, 0.5):
        r = imm_times.map_r(interp, s, t, k, gap, mapping)
        assert ((s <= r) & (r <= t)).all()


@both
@every_mapping
def test_the_prior_end_t_equal_1_has_a_finite_r(interp, mapping):
    """Times are in [0, 1]: t = 1 is the end of the trajectory, where eta is infinite."""
    r = imm_times.map_r(interp, tensor(0.0, 0.5, 1.0), tensor(1.0, 1.0, 1.0), 12, 0.0, mapping)
    assert ((r >= tensor(0.0, 0.5, 1.0)) & (r <= 1.0)).all()


def test_eta_decrement_larger_than_eta_is_clamped_at_the_data_end():
    # k = 4: the decrement of 10 exceeds eta(0.9) = 9; unclamped, r = -1 / (1 - 1) is infinite or above t.
    assert imm_times.map_r(OT, tensor(0.0), tensor(0.9), 4).item() == 0.0
    assert imm_times.map_r(OT, tensor(0.2), tensor(0.9), 4).item() == 0.2
    assert imm_times.map_r(OT, tensor(0.0), tensor(0.895), 4).item() == 0.0


def test_log_snr_takes_an_increment_and_so_moves_towards_data():
    r = imm_times.map_r(OT, tensor(0.0), tensor(0.5), 12, mapping="log_snr").item()
    span = 2 * math.log(0.999 / 0.001) - 2 * math.log(0.006 / 0.994)
    assert r == pytest.approx(1 / (1 + math.exp(span / 2**12 / 2)), rel=1e-12)
    assert r < 0.5


def test_the_ranges_of_the_other_mappings():
    r = imm_times.map_r(OT, tensor(0.0), tensor(0.5), 3, mapping="t").item()
    assert r == 0.5 - 1 / 8
    # 1 / eta: 199 at t = 0.005, 0 at t = 1; at t = 0.5 it is 1
    r = imm_times.map_r(OT, tensor(0.0), tensor(0.5), 3, mapping="inverse_eta").item()
    assert r == pytest.approx(1 / (1 + (1 + 199 / 8)), rel=1e-12)


def test_eta_range_and_last_time_can_be_set():
    r = imm_times.map_r(OT, tensor(0.0), tensor(0.5), 3, eta_max=4.0, eta_min=2.0).item()
    assert r == pytest.approx(0.75 / 1.75, rel=1e-12)
    r = imm_times.map_r(OT, tensor(0.0), tensor(0.5), 3, mapping="log_snr", t_max=0.5).item()
    assert r == pytest.approx(1 / (1 + math.exp(2 * math.log(999) / 8 / 2)), rel=1e-12)


PUBLISHED = {10: (0.1351, 27, 5.6e-6, 0.9748), 12: (0.0376, 11, 1.4e-6, 0.9495), 15: (0.0049, 2, 1.8e-7, 0.8569)}
published = pytest.mark.parametrize("k", [10, 12, 15])


@published
def test_below_t_star_the_target_is_exact(k):
    t_star = PUBLISHED[k][0]
    half_a_digit = 0.5e-4
    below, above = imm_times.map_r(OT, tensor(0.0, 0.0), tensor(t_star - half_a_digit, t_star + half_a_digit), k)
    assert below == 0.0
    assert above > 0.0


@published
def test_share_of_draws_with_an_exact_target(k):
    n = 400  # midpoints: error of the share about 1 / n
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    u_t, u_s = torch.meshgrid(grid, grid, indexing="ij")
    t, s = imm_times.draw(u_t.flatten(), u_s.flatten(), 0.0, 0.994)
    share = (imm_times.map_r(OT, s, t, k) == s).double().mean().item()
    step = 160 / 2**k
    t_star = step / (1 + step)
    above = np.linspace(t_star, 0.994, 200_001)
    stepped = (above / (1 - above) - step) / (1 + above / (1 - above) - step)
    closed_form = (t_star + np.trapezoid(1 - stepped / above, above)) / 0.994
    assert share == pytest.approx(closed_form, abs=2 / n)
    assert 100 * share == pytest.approx(PUBLISHED[k][1], abs=0.5)  # published as a whole percentage


@published
def test_smallest_gap_is_at_the_last_time_and_as_published(k):
    t = torch.linspace(PUBLISHED[k][0] + 0.01, 0.994, 5001, dtype=torch.float64)
    gap = t - imm_times.map_r(OT, torch.zeros_like(t), t, k)
    assert gap.argmin() == 5000
    assert gap[-1].item() == pytest.approx(PUBLISHED[k][2], rel=0.04)  # two published digits


@published
def test_a_gap_of_1e_4_binds_above_the_published_time(k):
    binding = PUBLISHED[k][3]
    t = tensor(binding - 2e-4, binding + 2e-4)
    zero = torch.zeros_like(t)
    free, gapped = imm_times.map_r(OT, zero, t, k), imm_times.map_r(OT, zero, t, k, min_gap=1e-4)
    assert free[0] == gapped[0]
    assert gapped[1] < free[1]
    assert gapped[1] == t[1] - 1e-4


def test_where_t_minus_s_is_below_the_gap_r_is_s():
    s = tensor(0.9 - 0.5e-4, 0.9)
    assert torch.equal(imm_times.map_r(OT, s, tensor(0.9, 0.9), 12, min_gap=1e-4), s)


def test_gap_of_each_precision():
    assert [imm_times.default_min_gap(p) for p in ("fp32", "tf32", "fp16", "bf16")] == [0.0, 0.0, 1e-4, 1e-4]


def test_unknown_mapping_is_refused_with_the_choice():
    with pytest.raises(UserError, match=r"'lambda'.*eta, t, log_snr, inverse_eta"):
        imm_times.map_r(OT, tensor(0.1), tensor(0.2), 12, mapping="lambda")


def test_a_step_longer_than_the_range_is_refused():
    with pytest.raises(UserError, match=r"k=-1.*at least 0"):
        imm_times.map_r(OT, tensor(0.1), tensor(0.2), -1)


@properties
@given(u_t=st.floats(0, 1), u_s=st.floats(0, 1), t_min=st.sampled_from([0.0, 0.006]))
def test_t_is_uniform_up_to_t_max_and_s_uniform_up_to_t(u_t, u_s, t_min):
    t, s = imm_times.draw(tensor(u_t), tensor(u_s), t_min, 0.994)
    assert t.item() == pytest.approx(t_min + (0.994 - t_min) * u_t, abs=1e-15)
    assert s.item() == pytest.approx(t_min + (t.item() - t_min) * u_s, abs=1e-15)
    assert t_min <= s <= t <= 0.994 + 1e-15


def weight_reference(name, t, a, b):
    """Equation 13, letter for letter."""
    t, b = mp.mpf(t), mp.mpf(b)
    if name == "ot_fm":
        alpha, sigma, slope = 1 - t, t, 2 / (t * (1 - t))
    else:
        alpha, sigma, slope = mp.cos(mp.pi * t / 2), mp.sin(mp.pi * t / 2), 2 * mp.pi / mp.sin(mp.pi * t)
    sigmoid = 1 / (1 + mp.exp(-(b - 2 * mp.log(alpha / sigma))))
    return sigmoid / 2 * slope * alpha ** mp.mpf(a) / (alpha**2 + sigma**2)


@both
@properties
@given(
    t=st.floats(1e-9, 0.999), a=st.sampled_from([0.0, 1.0, 1.5, 2.0]), b=st.sampled_from([-4.0, 0.0, 4.0, 5.0, 20.0])
)
def test_weight_is_equation_13(interp, t, a, b):
    weight = imm_times.weight(interp, tensor(t), a, b).item()
    expected = weight_reference(interp.name, t, a, b)
    # alpha has lost three digits at t = 0.999, its powers as many
    assert abs(weight - expected) <= 1e-12 * expected
    assert weight > 0


@both
@properties
@given(
    t=st.floats(1e-6, 0.999),
    factors=st.sets(st.sampled_from(["sigmoid", "dlog_snr_dt", "alpha"])),
    a=st.sampled_from([1.0, 2.0]),
)
def test_weight_of_fewer_factors_is_equation_13_without_the_others(interp, t, factors, a):
    t_ = mp.mpf(t)
    if interp is OT:
        alpha, sigma, slope = 1 - t_, t_, 2 / (t_ * (1 - t_))
    else:
        alpha, sigma, slope = mp.cos(mp.pi * t_ / 2), mp.sin(mp.pi * t_ / 2), 2 * mp.pi / mp.sin(mp.pi * t_)
    expected = mp.mpf("0.5")
    if "sigmoid" in factors:
        expected /= 1 + mp.exp(2 * mp.log(alpha / sigma) - 4)
    if "dlog_snr_dt" in factors:
        expected *= slope
    if "alpha" in factors:
        expected *= alpha**a / (alpha**2 + sigma**2)
    weight = imm_times.weight(interp, tensor(t), a, 4.0, factors).item()
    assert abs(weight - expected) <= 1e-12 * expected


@both
@pytest.mark.parametrize("b", [4.0, 5.0])
def test_weight_limits_at_both_ends(interp, b):
    near_data, near_prior, pi = 1e-9, 1e-6, math.pi
    cosine = interp.name == "vp_cosine"
    slope = (pi**2 / 4 if cosine else 1.0) * math.exp(b)
    for a in (1.0, 2.0):
        # the next term is e^b t smaller or so
        assert imm_times.weight(interp, tensor(near_data), a, b).item() == pytest.approx(slope * near_data, rel=1e-6)
    one, two = (imm_times.weight(interp, tensor(1 - near_prior), a, b).item() for a in (1.0, 2.0))
    assert one == pytest.approx(pi / 2 if cosine else 1.0, rel=1e-5)
    assert two == pytest.approx((pi**2 / 4 if cosine else 1.0) * near_prior, rel=1e-5)


@both
@pytest.mark.parametrize("a", [1.0, 2.0])
@pytest.mark.parametrize("b", [0.0, 4.0, 5.0, 60.0, -20.0])
def test_weight_is_finite_at_exactly_the_ends(interp, a, b):
    t = tensor(0.0, T_MAX[interp.name], 1.0)
    w = imm_times.weight(interp, t, a, b)
    assert torch.isfinite(w).all()
    assert w[0] == 0.0
    assert w[1] > 0.0
    expected = {1.0: math.pi / 2 if interp.name == "vp_cosine" else 1.0, 2.0: 0.0}[a]
    assert w[2].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_weight_keeps_fp64_and_shape():
    w = imm_times.weight(OT, torch.rand(3, 4, dtype=torch.float64), 1.0, 4.0)
    assert (w.dtype, w.shape) == (torch.float64, (3, 4))
