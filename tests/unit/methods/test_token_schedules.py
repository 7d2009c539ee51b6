"""Schedules against closed forms, enumeration over orders, and brute force over all schedules."""

import itertools

import numpy as np
import pytest

from imm_scale.evaluation.tokens import joints
from imm_scale.evaluation.tokens.joints import Joint
from imm_scale.methods.tokens import schedules

LOG2, LOG4 = np.log(2), np.log(4)
ROUNDING = 1e-12  # sums of a few hundred fp64 terms of order one
PRINTED = 5e-5  # half of the last of four decimals


def _compositions(length: int) -> list[tuple[int, ...]]:
    cuts = [c for r in range(length) for c in itertools.combinations(range(1, length), r)]
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, length))) for cut in cuts]


def _best(joint: Joint, steps: int) -> tuple[tuple[int, ...], float]:
    best = schedules.best_schedules(joint.profile())
    return best.sizes(steps), best.excess_L[steps - 1]


def test_four_hands():
    joint = joints.four_hands()
    assert joint.profile() == pytest.approx([LOG4, 0], abs=ROUNDING)
    assert schedules.excess(joint.profile(), (2,)) == pytest.approx(LOG4, abs=ROUNDING)
    assert schedules.excess(joint.profile(), (1, 1)) == pytest.approx(0, abs=ROUNDING)
    product = joint.stepwise([[0, 1]])
    assert product[joint.table > 0].sum() == pytest.approx(1 / 4, abs=ROUNDING), "validity"
    assert np.abs(product - joint.table).sum() / 2 == pytest.approx(3 / 4, abs=ROUNDING), "total variation"
    assert joint.cross_entropy(product) - joint.entropy() == pytest.approx(LOG4, abs=ROUNDING)


def test_five_hands():
    joint = joints.five_hands()
    assert joint.profile() == pytest.approx([1.4708, 0.1386], abs=PRINTED)
    assert joint.total_correlation == pytest.approx(1.3322, abs=PRINTED)
    assert joint.stepwise([[0, 1]])[joint.table > 0].sum() == pytest.approx(0.28, abs=ROUNDING), "validity"


def test_parity_and_copies_want_opposite_schedules():
    parity, copies = joints.parity(8), joints.copies(8, 4)
    assert parity.profile() == pytest.approx([LOG2] * 7 + [0], abs=ROUNDING)
    assert parity.total_correlation == pytest.approx(LOG2, abs=ROUNDING)
    assert copies.total_correlation == pytest.approx(7 * LOG4, abs=ROUNDING)
    equal = schedules.sizes_of("uniform", 8, 2)
    assert schedules.excess(parity.profile(), equal) == pytest.approx(0.6931, abs=PRINTED)
    assert schedules.excess(copies.profile(), equal) == pytest.approx(4.1589, abs=PRINTED)
    assert _best(parity, 2) == ((7, 1), pytest.approx(0, abs=ROUNDING))
    assert _best(copies, 2) == ((1, 7), pytest.approx(0, abs=ROUNDING))
    assert schedules.excess(parity.profile(), (1, 7)) == pytest.approx(LOG2, abs=ROUNDING), "no schedule serves both"
    assert schedules.excess(copies.profile(), (7, 1)) == pytest.approx(6 * LOG4, abs=ROUNDING)


def test_binary_chain():
    joint = joints.binary_chain(8, 0.1)
    h_T = joint.profile()
    assert joint.total_correlation == pytest.approx(2.5764, abs=PRINTED)
    assert schedules.excess(h_T, (8,)) == pytest.approx(joint.total_correlation, abs=ROUNDING)
    assert schedules.excess(h_T, schedules.sizes_of("uniform", 8, 2)) == pytest.approx(0.9973, abs=PRINTED)
    assert schedules.excess(h_T, schedules.sizes_of("uniform", 8, 4)) == pytest.approx(0.3064, abs=PRINTED)
    assert _best(joint, 2) == ((3, 5), pytest.approx(0.8330, abs=PRINTED))
    assert _best(joint, 4) == ((1, 2, 2, 3), pytest.approx(0.2199, abs=PRINTED))


def _split(order: tuple[int, ...], sizes: tuple[int, ...]) -> list[list[int]]:
    rest = iter(order)
    return [[next(rest) for _ in range(size)] for size in sizes]


@pytest.mark.parametrize("sizes", _compositions(4), ids=str)
def test_of_any_joint_formula_1_is_the_mean_over_orders_and_bounds_their_mixture(sizes):
    joint = joints.dirichlet(4, 3, seed=0)
    h_T = joint.profile()
    laws = [joint.stepwise(_split(order, sizes)) for order in itertools.permutations(range(4))]
    nll = np.mean([joint.cross_entropy(law) for law in laws])
    assert nll - joint.entropy() == pytest.approx(schedules.excess(h_T, sizes), abs=ROUNDING)
    assert schedules.nll(h_T, sizes) == pytest.approx(nll, abs=ROUNDING)
    mixture = joint.cross_entropy(np.mean(laws, axis=0)) - joint.entropy()
    assert schedules.excess(h_T, sizes) >= mixture - ROUNDING
    assert mixture > -ROUNDING


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_holds_for_equal_sizes_whether_or_not_they_divide(seed):
    h_T = np.sort(np.random.default_rng(seed).exponential(size=11))[::-1]
    for steps in range(1, 12):
        assert schedules.excess(h_T, schedules.sizes_of("uniform", 11, steps)) <= schedules.bound(h_T, steps) + ROUNDING
    worst = np.array([1.0, 1.0, 0.0])  # (1, 2): where T / L - 1 = 1/2 would not do
    assert schedules.excess(worst, schedules.sizes_of("uniform", 3, 2)) == schedules.bound(worst, 2) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_no_schedule_is_better_than_the_best(seed):
    h_T = np.sort(np.random.default_rng(seed).exponential(size=9))[::-1]
    best = schedules.best_schedules(h_T)
    for steps in range(1, 10):
        least = min(schedules.excess(h_T, k) for k in _compositions(9) if len(k) == steps)
        assert best.excess_L[steps - 1] == pytest.approx(least, abs=ROUNDING)
        assert schedules.excess(h_T, best.sizes(steps)) == pytest.approx(least, abs=ROUNDING)
    few = schedules.best_schedules(h_T, most=3)
    assert np.array_equal(few.excess_L, best.excess_L[:3]), "fewer rows of the same table"


def _table(h_T: np.ndarray, most: int) -> np.ndarray:
    """Recursion (3) as it is written, every a for every n."""
    length, known = len(h_T), np.concatenate([[0], np.cumsum(h_T)])
    a, n = np.arange(length)[:, None], np.arange(length + 1)
    cost = np.where(n > a, (n - a) * h_T[:, None] - (known - known[:-1, None]), np.inf)
    least = cost[0]
    rows = [least[-1]]
    for _ in range(most - 1):
        least = (least[:-1, None] + cost).min(axis=0)
        rows.append(least[-1])
    return np.array(rows)


@pytest.mark.parametrize("shape", ["steep", "stairs", "flat"])
def test_long_sequences_by_the_whole_table(shape):
    """Stairs, as a fit gives, have many schedules of one cost."""
    h_T = np.sort(np.random.default_rng(0).exponential(size=120))[::-1]
    h_T = {"steep": h_T**3, "stairs": np.repeat(h_T[::10], 10), "flat": np.ones(120)}[shape]
    best = schedules.best_schedules(h_T, 40)
    assert best.excess_L == pytest.approx(_table(h_T, 40), abs=1e-10), "sums of 120 terms of order 100"
    for steps in (1, 2, 7, 40):
        assert schedules.excess(h_T, best.sizes(steps)) == pytest.approx(best.excess_L[steps - 1], abs=1e-10)


def test_a_profile_that_rises_is_fitted_first():
    with pytest.raises(AssertionError, match="fit the profile"):
        schedules.best_schedules(np.array([1.0, 0.5, 0.6]))


@pytest.mark.parametrize(("length", "steps"), [(8, 3), (64, 8), (64, 64), (7, 7), (1024, 5), (5, 1)])
def test_sizes_are_whole(length, steps):
    for sizes in (schedules.sizes_of("uniform", length, steps), schedules.sizes_of("cosine", length, steps)):
        assert (sum(sizes), len(sizes)) == (length, steps)
        assert min(sizes) >= 1
    assert max(schedules.sizes_of("uniform", length, steps)) - min(schedules.sizes_of("uniform", length, steps)) <= 1


def test_cosine_sizes_by_hand():
    # 8 cos(pi l / 8) = 7.39, 5.66, 3.06, 0 tokens masked after each of 4 steps
    assert schedules.sizes_of("cosine", 8, 4) == (1, 1, 3, 3)
