"""The compute-optimal size against its closed form."""

import numpy as np
import pytest
from scipy.stats import binom

from imm_scale.errors import UserError
from imm_scale.sweeps import isoflop

E, A, ALPHA, B, BETA = 1.0, 300.0, 0.5, 900.0, 0.3


def _grid(sizes: np.ndarray, budgets: np.ndarray, power: float = 1.0) -> tuple[np.ndarray, ...]:
    """C, N, D and the loss there; an image costs 6 N^power."""
    C, N = (values.ravel() for values in np.meshgrid(budgets, sizes, indexing="ij"))
    D = C / (6 * N**power)
    return C, N, D, E + A / N**ALPHA + B / D**BETA


def _best(budget: float, power: float = 1.0) -> float:
    """The minimum by brute force."""
    N = np.geomspace(1e3, 1e12, 2_000_001)
    return float(N[(A / N**ALPHA + B / (budget / (6 * N**power)) ** BETA).argmin()])


@pytest.mark.parametrize("power", [1.0, 1.1])
def test_variable_projection_finds_the_minimum_that_a_parabola_misses(power):
    budgets = np.geomspace(1e14, 1e16, 4)
    # Sizes well to the right of the best ones, and exponents that differ: the case in which a parabola is biased.
    C, N, D, loss = _grid(np.geomspace(1e5, 1e9, 6) * 3, budgets, power)
    cost = isoflop.cost_of(N, C / D)
    assert cost.power == pytest.approx(power)
    exact = [_best(budget, power) for budget in budgets]
    projected = isoflop.variable_projection(C, N, D, loss, cost)
    # 2e-5 is the spacing of the brute force; the search over exponents stops at 1e-6 of their logarithm.
    assert [m.size.value for m in projected.minima] == pytest.approx(exact, rel=1e-3)
    assert projected.exponent.value == pytest.approx(BETA / (ALPHA + power * BETA), rel=1e-3)
    by_parabola = isoflop.parabola(C, N, loss)
    errors = [abs(np.log(m.size.value / best)) for m, best in zip(by_parabola.minima, exact, strict=True)]
    assert max(errors) > 0.2, "else this design would not show the bias"


def test_intervals_cover_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(isoflop, "RESAMPLES", 60)
    budgets, tries = np.geomspace(1e14, 1e16, 3), 12
    C, N, D, loss = _grid(np.geomspace(1e5, 1e8, 6), budgets)
    cost, best = isoflop.cost_of(N, C / D), _best(budgets[1])
    size_hits = exponent_hits = 0
    for seed in range(tries):
        noisy = loss * np.exp(0.01 * np.random.default_rng(seed).standard_normal(len(loss)))
        fit = isoflop.variable_projection(C, N, D, noisy, cost)
        size_hits += fit.minima[1].size.covers(best)
        exponent_hits += fit.exponent.covers(BETA / (ALPHA + BETA))
    least = binom.ppf(0.001, tries, isoflop.LEVEL)
    assert min(size_hits, exponent_hits) >= least, (size_hits, exponent_hits)


def test_a_parabola_finds_the_vertex_of_a_parabola():
    C, N, _, _ = _grid(np.geomspace(1e5, 1e7, 5), np.array([1e14, 1e15]))
    best = np.where(C == 1e14, 5e5, 2e6)
    loss = np.exp(0.1 + 0.2 * np.log(N / best) ** 2)
    fit = isoflop.parabola(C, N, loss)
    assert [m.size.value for m in fit.minima] == pytest.approx([5e5, 2e6])
    assert fit.exponent.value == pytest.approx(np.log(4) / np.log(10))


def test_what_is_no_minimum_is_said():
    C, N, D, loss = _grid(np.geomspace(1e8, 1e10, 5), np.array([1e14, 1e15]))  # all far too large
    assert any("outside the sizes" in warning for warning in isoflop.parabola(C, N, loss).warnings)
    falling = np.exp(-(np.log(N / 1e8) ** 2) / 100)
    assert any("not convex" in warning for warning in isoflop.parabola(C, N, falling).warnings)
    with pytest.raises(UserError, match="two budgets with three sizes"):
        isoflop.parabola(C[:5], N[:5], loss[:5])
    with pytest.raises(UserError, match="there are 4 points"):
        isoflop.variable_projection(C[:4], N[:4], D[:4], loss[:4], isoflop.cost_of(N, C / D))
    with pytest.raises(UserError, match="one size"):
        isoflop.cost_of(np.array([1.0, 1.0]), np.array([1.0, 1.0]))
