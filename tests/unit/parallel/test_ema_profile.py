"""Profiles of moving averages and least squares between them: against averages as they are kept, and quadrature."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from imm_scale.parallel import ema_profile
from imm_scale.parallel.ema import ShardedEma, power_function_exponent
from imm_scale.parallel.param_slice import ParamSlice

STEPS = 60


def _kept(decays: list[float], warmup: bool, skipped: tuple[int, ...] = ()) -> np.ndarray:
    """(decays, STEPS, STEPS + 1): what `ShardedEma` weighs after each step, read off weights that are unit vectors."""
    unit = torch.eye(STEPS + 1)
    part = ParamSlice("a", (STEPS + 1,), 0, {"weight": unit[0].clone()})
    ema, rows = ShardedEma([part], decays), []
    for i in range(1, STEPS + 1):
        part.states["weight"].copy_(unit[i])
        if i not in skipped:
            ema.update(1 / i if warmup else 0.0)
        rows.append(np.stack([ema.averages[decay][0].numpy().copy() for decay in decays]))
    return np.array(rows).swapaxes(0, 1).astype(np.float64)


def _direct(width: float, steps: int = STEPS) -> np.ndarray:
    """(steps + 1,): the telescoped power function, (i / n)^p - ((i - 1) / n)^p."""
    edges = (np.arange(-1, steps + 1).clip(0) / steps) ** (power_function_exponent(width) + 1.0)
    return np.diff(edges)


def _nearest(profiles: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The combination (n + 1,) of rows that add up to 1: numpy's least squares, the last row's share eliminated."""
    last = profiles[-1]
    x = np.linalg.lstsq((profiles[:-1] - last).T, target - last, rcond=1e-9)[0]
    return last + x @ (profiles[:-1] - last)


@pytest.mark.parametrize(
    ("decays", "warmup"),
    [([1 - 1e-9, 0.8], True), ([0.9, 0.8], True), ([0.97, 0.9], False)],  # 0.8 and 0.9 take over at 36 and 76
    ids=["power function and capped", "both capped", "exponential"],
)
@pytest.mark.parametrize("width", [0.06, 0.1, 0.2])
def test_the_nearest_combination_is_the_one_of_numpy(decays, warmup, width):
    """Of averages that were really kept; both profiles of the fit are rebuilt from its coefficients alone."""
    kept, stored = _kept(decays, warmup), [20, 40, 60]
    kinds, steps = [0, 1] * 3, [step for step in stored for _ in decays]
    profiles = np.stack([kept[kind, step - 1] for kind, step in zip(kinds, steps, strict=True)])
    target = _direct(width)
    log_decays = np.stack([ema_profile.tracked(STEPS, decay, warmup) for decay in decays])
    fit = ema_profile.fit(log_decays, kinds, steps, ema_profile.power_function(STEPS, width))
    ours, theirs = np.array(fit.coefficients) @ profiles, _nearest(profiles, target)
    # What is kept is fp32, and up to a few coefficients of order 10 multiply its rounding.
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert fit.error == pytest.approx(np.linalg.norm(theirs - target) / np.linalg.norm(target), abs=1e-4)
    assert sum(fit.coefficients) == pytest.approx(1.0, abs=1e-9)


def test_steps_that_updated_nothing_weigh_nothing():
    skipped = (7, 31, 32)
    kept = _kept([1 - 1e-9, 0.8], True, skipped)
    log_decays = np.stack([ema_profile.tracked(STEPS, decay, True) for decay in (1 - 1e-9, 0.8)])
    log_decays[:, skipped] = 0.0
    for kind in (0, 1):
        fit = ema_profile.fit(log_decays, [0, 1, 0], [40, STEPS, STEPS], log_decays[kind])
        assert fit.error < 1e-7
    products = ema_profile._inner_products(log_decays, [0, 1, 0], [40, STEPS, STEPS])
    rows = np.stack([kept[0, 39], kept[1, -1], kept[0, -1]])
    np.testing.assert_allclose(products, rows @ rows.T, atol=1e-7)  # sums of products of fp32 below 0.3


def test_coefficients_are_those_of_quadrature():
    """On the time axis [0, 1], with integrals by Gauss-Legendre: steps are but a fine grid of it.

    A power function of 0.10, and one that 1 - 20 / n takes over from at t = 7.94 / 20, at t = 0.5, 0.75 and 1.
    """
    steps, ends, rate, width = 40_000, (0.5, 0.75, 1.0), 20.0, 0.07
    power = power_function_exponent(0.10) + 1.0
    knots = [0.0, power / rate, *ends]
    nodes, weights = np.polynomial.legendre.leggauss(60)
    t = np.concatenate([a + (b - a) * (nodes + 1) / 2 for a, b in pairwise(knots)])
    dt = np.concatenate([(b - a) * weights / 2 for a, b in pairwise(knots)])

    def density(exponent: float, end: float) -> np.ndarray:
        return np.where(t < end, exponent * t ** (exponent - 1) / end**exponent, 0.0)

    def capped(end: float) -> np.ndarray:
        """rate(t) * exp(-integral of rate from t to end), rate(t) = min of growth there: max(power / t, rate)."""
        start = power / rate
        below = density(power, start) * np.exp(-rate * (end - start))
        return np.where(t < start, below, np.where(t < end, rate * np.exp(-rate * (end - t)), 0.0))

    profiles = np.stack([profile for end in ends for profile in (density(power, end), capped(end))])
    target = density(power_function_exponent(width) + 1.0, 1.0)
    apart, aim = profiles[:-1] - profiles[-1], target - profiles[-1]
    x = np.linalg.solve((apart * dt) @ apart.T, (apart * dt) @ aim)
    left = aim - x @ apart
    log_decays = np.stack([ema_profile.tracked(steps, decay, True) for decay in (1 - 1e-12, 1 - rate / steps)])
    stored = [round(end * steps) for end in ends for _ in (0, 1)]
    fit = ema_profile.fit(log_decays, [0, 1] * 3, stored, ema_profile.power_function(steps, width))
    # A sum over n steps is the integral to 1 / n of rates of order 20, and the system is of condition 1e3.
    np.testing.assert_allclose(fit.coefficients, [*x, 1 - x.sum()], atol=5e-3)
    error = np.sqrt((left**2 * dt).sum() / (target**2 * dt).sum())
    assert fit.error == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize(
    ("checkpoints", "widths", "most"),
    [(16, (0.03, 0.05, 0.075, 0.1, 0.15, 0.2), 0.036), (8, (0.04, 0.05, 0.075, 0.15), 0.038)],
)
def test_widths_that_the_docs_name_are_within_reach(checkpoints, widths, most):
    steps = 16_000
    log_decays = np.stack([ema_profile.tracked(steps, decay, True) for decay in (1 - 1e-9, 1 - 20 / steps)])
    stored = [steps * c // checkpoints for c in range(1, checkpoints + 1) for _ in (0, 1)]
    for width in widths:
        target = ema_profile.power_function(steps, width)
        assert ema_profile.fit(log_decays, [0, 1] * checkpoints, stored, target).error <= most


def test_averages_that_are_the_same_share_their_part():
    """Two that are both still warming up: no combination is singled out, and none grows without bound."""
    log_decays = np.stack([ema_profile.tracked(STEPS, decay, True) for decay in (1 - 1e-9, 1 - 1e-8)])
    fit = ema_profile.fit(log_decays, [0, 1, 0, 1], [40, 40, 60, 60], ema_profile.power_function(STEPS, 0.10))
    np.testing.assert_allclose(fit.coefficients, [0, 0, 0.5, 0.5], atol=1e-6)
