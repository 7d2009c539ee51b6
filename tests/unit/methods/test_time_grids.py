"""Time grids (imm.md section 6)."""

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imm_scale.errors import UserError
from imm_scale.methods.probability_path import OTFlowMatching, VPCosine
from imm_scale.methods.time_grids import time_grid
from tests.unit.methods.small import flow_matching, imm

mp.mp.dps = 60  # one number in all tests: it is global
OT, COSINE = OTFlowMatching(), VPCosine()
both = pytest.mark.parametrize("interp", [OT, COSINE], ids=lambda i: i.name)
T_MAX = {"ot_fm": 0.994, "vp_cosine": 0.996}


def eta(interp, t):
    return mp.mpf(t) / (1 - mp.mpf(t)) if interp is OT else mp.tan(mp.pi * mp.mpf(t) / 2)


def eta_inverse(interp, e):
    return e / (1 + e) if interp is OT else 2 / mp.pi * mp.atan(e)


@both
@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["uniform", "edm"]), steps=st.integers(1, 300), t_min=st.sampled_from([0.0, 0.006, 0.3]))
def test_grids_have_steps_plus_1_strictly_decreasing_times_with_exact_ends(interp, kind, steps, t_min):
    t_max = T_MAX[interp.name]
    grid = time_grid(interp, kind, steps, t_min, t_max)
    assert (grid.shape, grid.dtype) == ((steps + 1,), torch.float64)
    assert grid[0].item() == t_max
    assert grid[-1].item() == t_min
    assert (grid[1:] < grid[:-1]).all()


def test_uniform_is_even_in_t():
    grid = time_grid(OT, "uniform", 4, 0.006, 0.994)
    expected = [0.994 - i * (0.994 - 0.006) / 4 for i in range(5)]
    assert grid.tolist() == pytest.approx(expected, abs=1e-15)
    # the released config's two steps meet half way
    assert time_grid(OT, "uniform", 2, 0.0, 0.994)[1].item() == pytest.approx(0.497, abs=1e-15)


def test_uniform_reaches_from_the_prior_itself():
    assert time_grid(OT, "uniform", 2, 0.0, 1.0).tolist() == [1.0, 0.5, 0.0]


@both
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("t_min", [0.0, 0.006])
def test_edm_is_even_in_the_seventh_root_of_eta_and_ends_at_t_min_itself(interp, steps, t_min):
    t_max = T_MAX[interp.name]
    grid = time_grid(interp, "edm", steps, t_min, t_max)
    high, low = (mp.root(eta(interp, t), 7) if t else mp.mpf(0) for t in (t_max, t_min))
    for i, t in enumerate(grid.tolist()):
        expected = eta_inverse(interp, (high + (low - high) * i / steps) ** 7)
        # eta^(1/7) to the 7th power and back: ten roundings on values up to 1
        assert t == pytest.approx(float(expected), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("interp", "middle"), [(OT, 0.5833), (COSINE, 0.6051)], ids=["ot_fm", "vp_cosine"])
def test_two_steps_meet_at_eta_1_4(interp, middle):
    grid = time_grid(interp, "eta_1.4", 2, 0.0, T_MAX[interp.name])
    assert grid[0].item() == T_MAX[interp.name]
    assert grid[2].item() == 0.0
    assert grid[1].item() == pytest.approx(middle, abs=0.5e-4)  # four published digits
    assert interp.eta(grid[1]).item() == pytest.approx(1.4, rel=1e-14)


def test_default_is_the_papers_choice():
    assert imm().default_grid(2) == "eta_1.4"
    assert {imm().default_grid(steps) for steps in (1, 4, 8, 16)} == {"uniform"}
    assert flow_matching().default_grid(2) == "uniform"


def test_times_can_be_given_one_by_one():
    grid = time_grid(OT, "0.994,0.5,0", 2, 0.1, 0.9)
    assert grid.tolist() == [0.994, 0.5, 0.0]
    assert grid.dtype == torch.float64


@pytest.mark.parametrize(
    ("text", "steps", "match"),
    [
        ("0.9,0.5,0", 3, r"2 steps, not 3.*--steps 2"),
        ("0.5,0.9,0", 2, r"0\.5,0\.9,0.*decrease"),
        ("0.5,0.5", 1, "decrease"),
        ("1.5,0.5", 1, "at most 1"),
        ("0.5,-0.1", 1, "at least 0"),
        ("nan,0.5", 1, "decrease"),
        ("0.5,x", 1, r"0\.5,x.*uniform, edm, eta_1\.4"),
        ("0.5,", 1, r"0\.5,.*uniform, edm, eta_1\.4"),
    ],
)
def test_times_that_are_no_grid_are_refused_with_the_remedy(text, steps, match):
    with pytest.raises(UserError, match=match):
        time_grid(OT, text, steps, 0.0, 0.994)


@pytest.mark.parametrize("steps", [0, -3])
@pytest.mark.parametrize("kind", ["uniform", "edm", "eta_1.4"])
def test_fewer_than_one_step_is_refused(kind, steps):
    with pytest.raises(UserError, match=rf"steps={steps}.*at least 1"):
        time_grid(OT, kind, steps, 0.0, 0.994)


def test_an_unknown_kind_is_refused_with_the_choice():
    with pytest.raises(UserError, match=r"'karras'.*uniform, edm, eta_1.4"):
        time_grid(OT, "karras", 4, 0.0, 0.994)


@pytest.mark.parametrize("steps", [1, 3])
def test_eta_1_4_with_other_than_two_steps_is_refused(steps):
    with pytest.raises(UserError, match=rf"not {steps}.*uniform"):
        time_grid(OT, "eta_1.4", steps, 0.0, 0.994)


@both
def test_edm_from_where_eta_is_infinite_is_refused(interp):
    with pytest.raises(UserError, match=r"1\.0.*uniform"):
        time_grid(interp, "edm", 4, 0.0, 1.0)


@pytest.mark.parametrize("kind", ["uniform", "edm"])
@pytest.mark.parametrize(("t_min", "t_max"), [(0.5, 0.5), (0.8, 0.2)])
def test_ends_in_the_wrong_order_are_refused(kind, t_min, t_max):
    with pytest.raises(UserError, match=str(t_min)):
        time_grid(OT, kind, 4, t_min, t_max)


@pytest.mark.parametrize(("t_min", "t_max"), [(0.6, 0.994), (0.0, 0.5)])
def test_eta_1_4_with_its_middle_outside_the_ends_is_refused(t_min, t_max):
    """The grid would climb: f_{s,t} is not defined for s > t."""
    with pytest.raises(UserError, match=r"uniform"):
        time_grid(OT, "eta_1.4", 2, t_min, t_max)
