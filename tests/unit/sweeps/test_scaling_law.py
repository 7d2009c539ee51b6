"""Scaling laws recovered from data made of known ones."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import huber
from scipy.stats import binom

from imm_scale.errors import UserError
from imm_scale.sweeps import scaling_law

# The re-analysis of Hoffmann et al.'s data by Besiroglu et al. (arXiv 2404.10102, table 1).
CHINCHILLA = {"E": 1.82, "A_N": 482.0, "exponent_N": 0.3478, "A_D": 2085.0, "exponent_D": 0.3658}


def _loss(c: dict[str, float], N: np.ndarray, D: np.ndarray) -> np.ndarray:
    return c["E"] + c["A_N"] / N ** c["exponent_N"] + c["A_D"] / D ** c["exponent_D"]


def _chinchilla_design() -> tuple[np.ndarray, np.ndarray]:
    """Sizes of 44 M to 16 B parameters on nine budgets of 6e18 to 3e21 FLOPs, as in the paper, D = C / 6N."""
    sizes = np.geomspace(44e6, 16e9, 14)
    budgets = np.array([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21])
    N, C = (values.ravel() for values in np.meshgrid(sizes, budgets))
    D = C / (6 * N)
    inside = (D > 2e8) & (D < 5e11)
    return N[inside], D[inside]


def test_the_chinchilla_constants_come_back_from_exact_data():
    N, D = _chinchilla_design()
    fit = scaling_law.joint_law(N, D, _loss(CHINCHILLA, N, D), resamples=10)
    for name, value in fit.constants().items():
        # Without noise only the optimizer's tolerance is left; A and B multiply it by log N, about 20.
        assert value[0] == pytest.approx(CHINCHILLA[name], rel=1e-4)
    assert fit.agreeing_starts > 0.9


def test_the_chinchilla_constants_lie_in_their_intervals_with_noise():
    N, D = _chinchilla_design()
    noise = 0.01 * np.random.default_rng(5).standard_normal(len(N))
    fit = scaling_law.joint_law(N, D, _loss(CHINCHILLA, N, D) * np.exp(noise), resamples=200)
    for name, interval in fit.intervals(level=0.99).items():
        assert interval.covers(CHINCHILLA[name]), f"{name}: {interval}"
    # The published standard errors of alpha and beta are 0.02 at 240 points; an interval of 90 % is 3.3 of them wide.
    for name in ("exponent_N", "exponent_D"):
        interval = fit.intervals()[name]
        assert interval.high - interval.low < 0.066


def _tiny_design() -> tuple[np.ndarray, np.ndarray]:
    """5 sizes x 5 amounts of data x 2 seeds over factors of 15 and 20, as a small study has them."""
    N, D = (v.ravel().repeat(2) for v in np.meshgrid(np.geomspace(1, 15, 5), np.geomspace(1, 20, 5)))
    return N, D


_TINY = {"E": 0.3, "A_N": 1.0, "exponent_N": 0.7, "A_D": 2.0, "exponent_D": 0.6}


def _within(hits: int, tries: int, level: float) -> bool:
    """Whether so many hits are not surprising (1 in 1,000 on either side) at this coverage."""
    return binom.ppf(0.001, tries, level) <= hits <= binom.ppf(0.999, tries, level)


def test_joint_intervals_cover_as_often_as_they_say():
    N, D = _tiny_design()
    truth, tries = _loss(_TINY, N, D), 50
    there = (25.0, 33.0)  # beyond the design, as a prediction is
    beyond = float(_loss(_TINY, *(np.array([v]) for v in there))[0])
    hits = dict.fromkeys([*_TINY, "prediction"], 0)
    for seed in range(tries):
        rng = np.random.default_rng(seed)
        law = scaling_law.joint_law(N, D, truth * np.exp(0.03 * rng.standard_normal(len(N))), resamples=100)
        for name, interval in law.intervals().items():
            hits[name] += interval.covers(_TINY[name])
        hits["prediction"] += law.predict(*there).covers(beyond * np.exp(0.03 * rng.standard_normal()))
    for name, count in hits.items():
        assert _within(count, tries, scaling_law.LEVEL), f"{name}: {count} of {tries}"


def test_power_law_intervals_of_twelve_points_cover_four_times_in_five():
    # Three constants from six budgets with two seeds: the distribution is skewed, and the stated 90 % are 80 to 90.
    C = np.geomspace(1, 150, 6).repeat(2)
    truth, tries = 0.5 + 2.0 / C**0.5, 60
    hits = dict.fromkeys(("E", "A_C", "exponent_C"), 0)
    for seed in range(tries):
        noise = 0.03 * np.random.default_rng(seed).standard_normal(len(C))
        law = scaling_law.power_law(C, truth * np.exp(noise), resamples=100)
        for name, interval in law.intervals().items():
            hits[name] += interval.covers({"E": 0.5, "A_C": 2.0, "exponent_C": 0.5}[name])
    for name, count in hits.items():
        assert binom.ppf(0.001, tries, 0.8) <= count, f"{name}: {count} of {tries}"


def test_the_minimum_is_the_one_scipy_finds():
    """The same objective written with the constants themselves, scipy's Huber, and Nelder and Mead from our answer."""
    N, D = _tiny_design()
    loss = _loss(_TINY, N, D) * np.exp(0.05 * np.random.default_rng(1).standard_normal(len(N)))
    fit_constants = scaling_law.joint_law(N, D, loss, delta=0.02, resamples=2).constants()
    ours = np.array([fit_constants[name][0] for name in _TINY])

    def objective(constants: np.ndarray) -> float:
        E, A, alpha, B, beta = constants
        law = E + A / N**alpha + B / D**beta
        return huber(0.02, np.log(loss) - np.log(law)).sum() if (law > 0).all() else np.inf

    theirs = minimize(objective, ours * 1.05, method="Nelder-Mead", options={"maxiter": 4000, "fatol": 1e-13})
    assert objective(ours) <= theirs.fun * (1 + 1e-6)


def test_one_outlier_moves_the_fit_little():
    N, D = _chinchilla_design()
    loss = _loss(CHINCHILLA, N, D)
    loss[7] *= 1.5
    constants = scaling_law.joint_law(N, D, loss, resamples=2).constants()
    assert constants["exponent_N"][0] == pytest.approx(CHINCHILLA["exponent_N"], rel=0.01)


def test_too_few_points_are_refused():
    with pytest.raises(UserError, match="4 points cannot carry a law of 5 parameters"):
        scaling_law.joint_law(np.array([1, 1, 2, 2.0]), np.array([1, 2, 1, 2.0]), np.ones(4))
    with pytest.raises(UserError, match="needs at least 3"):
        scaling_law.power_law(np.array([1, 1, 2, 2.0]), np.array([2, 2.1, 1, 1.1]))
    with pytest.raises(UserError, match="leave diverged cells out"):
        scaling_law.power_law(np.array([1, 2, 3, 4.0]), np.array([2, 1, np.nan, 1]))


def test_what_the_data_cannot_tell_is_said():
    N, D = _tiny_design()
    noise = np.exp(0.05 * np.random.default_rng(1).standard_normal(len(N)))
    without_size = scaling_law.joint_law(N, D, (0.3 + 2.0 / D**0.6) * noise, resamples=50)
    assert any("in which N does not matter" in doubt for doubt in without_size.warnings)
    without_offset = scaling_law.power_law(D, 2.0 / D**0.6 * noise, resamples=50)
    assert any("without an offset E" in doubt for doubt in without_offset.warnings)
    clear = scaling_law.joint_law(N, D, _loss(_TINY, N, D) * noise**0.1, resamples=50)
    assert clear.warnings == ()
