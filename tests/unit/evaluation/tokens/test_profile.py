"""Profiles of perfect models of small joints against the sums they estimate."""

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression

from imm_scale.errors import UserError
from imm_scale.evaluation.tokens import joints, parts, profile, scoring
from imm_scale.evaluation.tokens.joints import Joint
from imm_scale.evaluation.tokens.parts import Parts
from imm_scale.evaluation.tokens.profile import Profile, Scores
from imm_scale.methods.tokens import schedules

ERRORS = 4.0  # standard errors: one draw in 16,000 is farther, and the seeds are fixed


def _scores(joint: Joint, samples: int, passes: int, seed: int = 0) -> Scores:
    collect = Parts(None, {}, batch=500).collect
    return scoring.score(joint, joint.sample(samples, seed), passes, seed, collect)


@pytest.mark.parametrize("passes", [1, 6])
def test_means_are_the_profile_and_errors_their_distance(passes):
    joint = joints.dirichlet(6, 2, seed=3)
    estimated, exact = Profile(_scores(joint, 1500, passes)), joint.profile()
    for n in range(6):
        value, error = estimated.at(n)
        assert abs(value - exact[n]) < ERRORS * error, n
        assert 0 < error < 0.1
    assert abs(estimated.nll.value - joint.entropy()) < ERRORS * estimated.nll.error


@pytest.mark.parametrize("passes", [1, 4])
def test_errors_are_the_spread_of_repeats(passes):
    """At several n of each sample the scores depend on each other, and so do the means."""
    joint = joints.binary_chain(4, 0.1)
    estimates = [Profile(_scores(joint, 80, passes, seed)).nll for seed in range(60)]
    spread = np.std([estimate.value for estimate in estimates], ddof=1)
    # a standard deviation of 60 values is known to 1 / sqrt(118) = 9 %: three of that
    assert np.mean([estimate.error for estimate in estimates]) == pytest.approx(spread, rel=0.28)


def test_best_schedules_are_found_on_one_half_and_cost_what_they_must():
    joint = joints.binary_chain(8, 0.1)
    costs = profile.schedule_costs(_scores(joint, 1000, 8), profile.step_counts(8))
    exact = joint.profile()
    assert [cost.steps for cost in costs] == [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8]
    for cost in costs:
        assert abs(cost.excess.value - schedules.excess(exact, cost.sizes)) <= ERRORS * cost.excess.error + 1e-12
        assert abs(cost.nll.value - schedules.nll(exact, cost.sizes)) <= ERRORS * cost.nll.error + 1e-12
    sizes = {cost.steps: cost.sizes for cost in costs if cost.kind == "best"}
    assert (sizes[1], sizes[8]) == ((8,), (1,) * 8)
    # Chosen by a noisy profile: nearer to the best sizes' excess (.8330, .2199) than to the equal ones' (.9973, .3064).
    assert schedules.excess(exact, sizes[2]) < 0.91
    assert schedules.excess(exact, sizes[4]) < 0.26
    assert costs[-1].excess == (0.0, 0.0), "one token a step loses nothing"
    assert list(profile.floor(costs)) == [1, 2, 4, 8]


def test_crossed_halves_do_not_flatter():
    """Of 4 tokens, too few to smooth their profile: what sizes cost on the samples that chose them, and on others.

    Both beside what the sizes that are best in truth cost on the same samples, which nothing is below but by chance.
    """
    exact_T = np.array([1.0, 0.9, 0.8, 0.7])
    best = schedules.best_schedules(exact_T)
    generator, own, crossed = np.random.default_rng(0), [], []
    for _ in range(200):
        visible = np.arange(160) // 2 % 4
        scores = Scores(4, np.arange(160), visible, exact_T[visible] + generator.normal(size=160))
        estimated = Profile(scores)
        least = schedules.nll(estimated.means(), best.sizes(2))
        own.append(schedules.nll(estimated.means(), schedules.best_schedules(estimated.fitted()).sizes(2)) - least)
        crossed.append(profile.schedule_costs(scores, [2])[-1].nll.value - least)
    assert np.mean(own) < -ERRORS * np.std(own) / np.sqrt(200), "cheaper than any schedule can be"
    assert np.mean(crossed) > -ERRORS * np.std(crossed) / np.sqrt(200)


def test_the_fit_does_not_rise_and_keeps_the_sum():
    estimated = Profile(_scores(joints.parity(8), 40, 8))
    fitted = estimated.fitted()
    assert np.all(np.diff(fitted) <= 0)
    assert fitted.sum() == pytest.approx(estimated.nll.value, abs=1e-9), "equal counts: pooling keeps means"


def _noisy(exact_T, each: int, noise: float, seed: int) -> Profile:
    """So many scores at every number of visible tokens."""
    length = len(exact_T)
    visible = np.tile(np.arange(length), each)
    scores = exact_T[visible] + noise * np.random.default_rng(seed).normal(size=len(visible))
    return Profile(Scores(length, np.arange(len(visible)), visible, scores))


@pytest.mark.parametrize(
    ("exact_T", "noise"),
    [(np.linspace(2.8, 0.9, 64), 0.5), (0.1 + 0.3 / np.sqrt(1 + np.arange(64) / 8), 0.06)],
    ids=["a line, as text has", "a bend, as pixels have"],
)
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_best_sizes_of_a_noisy_profile_cost_little_more_than_the_best(exact_T, noise, steps):
    """What 32 scores a number of visible tokens choose, against the exact least excess and that of equal sizes."""
    least = schedules.best_schedules(exact_T, steps).excess_L[-1]
    equal = schedules.excess(exact_T, schedules.sizes_of("uniform", 64, steps))
    fits = [_noisy(exact_T, 32, noise, seed) for seed in range(20)]
    chosen, pooled = [], []
    for one in fits:
        chosen.append(schedules.best_schedules(one.fitted(), steps).sizes(steps))
        stairs_T = isotonic_regression(one.mean_M, increasing=False).x
        pooled.append(schedules.best_schedules(stairs_T, steps).sizes(steps))
    above, above_pooled = (np.mean([schedules.excess(exact_T, k) for k in sizes]) - least for sizes in (chosen, pooled))
    # Along a line equal sizes are the best: .04, .03 and .01 nats are lost of 29.9, 14.5 and 6.8. A bend has .85, .45
    # and .20 to gain, of which a sixth at most is lost. Without smoothing .4 to .8 is lost of a line.
    assert above < 0.06 + 0.2 * (equal - least)
    assert above < above_pooled


@pytest.mark.parametrize("exact_T", [np.repeat([np.log(2), 0], [63, 1]), np.repeat([np.log(4), 0], [1, 63])])
def test_smoothing_keeps_a_jump(exact_T):
    """Parity of 64 bits, and 64 copies of one of four tokens: two steps of the right sizes lose nothing."""
    sizes = schedules.best_schedules(_noisy(exact_T, 2, 0.0, 0).fitted(), 2).sizes(2)
    assert schedules.excess(exact_T, sizes) == pytest.approx(0, abs=1e-12)


def test_few_numbers_of_visible_tokens_are_not_smoothed():
    exact_T = np.array([2.0, 1.0, 0.9, 0.2])
    assert _noisy(exact_T, 2, 0.0, 0).fitted() == pytest.approx(exact_T, rel=1e-12)


def test_long_sequences_are_scored_at_64_numbers_with_lines_between():
    nodes = profile.nodes(1024)
    assert len(nodes) == 64
    assert (nodes[0], nodes[1], nodes[-1]) == (0, 1, 1023)
    assert np.array_equal(profile.nodes(256), np.arange(256))
    line = np.linspace(2.0, 1.0, 1024)
    values = np.concatenate([line[nodes] + 0.1, line[nodes] - 0.1])
    estimated = Profile(Scores(1024, np.arange(128), np.tile(nodes, 2), values))
    assert estimated.means() == pytest.approx(line, abs=1e-12)
    assert estimated.nll.value == pytest.approx(line.sum(), abs=1e-9)
    # between neighbours: two values 0.2 apart have a mean with error 0.1, weighted by the distances
    a, b = nodes[40], nodes[41]
    near = (b - (a + 1)) / (b - a)
    assert estimated.at(a + 1).error == pytest.approx(0.1 * np.hypot(near, 1 - near), rel=1e-9)


class _Marginals(scoring.Scorer):
    """Knows how often each token comes, and no more."""

    def __init__(self, joint: Joint):
        self.logs = torch.from_numpy(np.log(joint.marginal([0]).ravel()))

    def token_scores(self, x_NT, visible_NT):
        return -self.logs[x_NT]


def test_a_net_that_predicts_marginals_is_told():
    joint = Joint(np.multiply.outer([0.3, 0.7], [0.3, 0.7]) * 0.5 + np.diag([0.15, 0.35]))
    x = joint.sample(400, 0)
    scores = scoring.score(_Marginals(joint), x, 1, 0, Parts(None, {}, 64).collect)
    fall = Profile(scores).fall
    said = f"= {fall.value:.4f} nats is not above {3 * fall.error:.4f}, 3 standard errors"
    assert "predicts marginals only" in profile.alarm(Profile(scores)) and said in profile.alarm(Profile(scores))
    assert profile.alarm(Profile(_scores(joint, 400, 1))) is None
    constant = Scores(2, np.arange(8), np.arange(8) // 2 % 2, np.full(8, 0.5))
    assert profile.alarm(Profile(constant)) is not None, "without any spread too"


def test_numbers_of_visible_tokens_are_exact_and_rows_know_nothing_of_batches():
    visible = torch.arange(7)
    masks = scoring.visible_of(5, torch.arange(7), visible, 7)
    assert torch.equal(masks.sum(dim=1), visible)
    assert torch.equal(masks[3:], scoring.visible_of(5, torch.arange(3, 7), visible[3:], 7))


@pytest.mark.parametrize(("samples", "length", "passes"), [(64, 8, 1), (10, 8, 8), (40, 300, 7)])
def test_each_half_sees_every_number_equally_often(samples, length, passes):
    sample, visible = scoring.places(samples, length, passes)
    for half in (0, 1):
        counts = np.unique(visible[sample % 2 == half], return_counts=True)[1]
        assert len(counts) == len(profile.nodes(length))
        assert counts.max() - counts.min() <= passes
    assert len({*zip(sample.tolist(), visible.tolist(), strict=True)}) == samples * passes, "none twice"


@pytest.mark.parametrize(
    ("samples", "passes", "words"),
    [(10, 1, ["10 samples", "--passes 4"]), (1, 2, ["more samples"]), (9, 9, ["1 to 8"])],
)
def test_too_few_samples(samples, passes, words):
    with pytest.raises(UserError) as caught:
        scoring.places(samples, 8, passes)
    assert all(word in str(caught.value) for word in words)


def test_no_probability_for_a_token_is_an_error():
    visible = torch.tensor([[True, False]])
    never_seen = joints.four_hands().token_scores(torch.tensor([[0, 1]]), visible)
    with pytest.raises(UserError, match="inf with 1 tokens visible"):
        scoring.mean_of_masked(never_seen, visible)


@pytest.mark.parametrize("seconds", [-1.0, 1e9], ids=["written at once", "written when stopped"])
def test_a_pass_goes_on_where_it_was_stopped(seconds, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_WRITE_SECONDS", seconds)
    calls = []

    def rows(start: int, stop: int) -> np.ndarray:
        calls.append((start, stop))
        if start >= 40 and len(calls) < 5:
            raise KeyboardInterrupt
        return np.arange(start, stop) / 10

    with pytest.raises(KeyboardInterrupt):
        Parts(str(tmp_path), {"seed": 0}, batch=20).collect("masked", rows, 90)
    values = Parts(str(tmp_path), {"seed": 0}, batch=20).collect("masked", rows, 90)
    assert np.array_equal(values, np.arange(90) / 10)
    assert calls == [(0, 20), (20, 40), (40, 60), (0, 20), (40, 60), (60, 80), (80, 90)]
    with pytest.raises(UserError, match="another model"):
        Parts(str(tmp_path), {"seed": 0}, 20).collect("masked", lambda a, b: np.ones(b - a), 90)
    assert Parts(str(tmp_path), {"seed": 1}, 90).collect("masked", lambda a, b: np.ones(b - a), 90).sum() == 90
