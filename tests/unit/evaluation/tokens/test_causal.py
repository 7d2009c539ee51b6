"""Profiles from left to right and losses of blocks of a Markov chain, whose conditionals at any distance are known."""

import numpy as np
import pytest
import torch
from scipy.special import entr

from imm_scale.errors import UserError
from imm_scale.evaluation.tokens import causal, joints
from imm_scale.evaluation.tokens.causal import Rollouts
from imm_scale.evaluation.tokens.parts import Parts

FLIP = 0.1
ERRORS = 4.0  # standard errors; the seeds are fixed
PARTS = Parts(None, {}, batch=50)


class Chain:
    """The next bit differs with probability FLIP."""

    first = 1

    def next_log_probs(self, x_NT):
        same = torch.nn.functional.one_hot(x_NT[:, -1], 2).double()
        return (FLIP + (1 - 2 * FLIP) * same).log()

    def token_scores(self, x_NT):
        changed = x_NT[:, 1:] != x_NT[:, :-1]
        scores = -torch.where(changed, FLIP, 1 - FLIP).double().log()
        return torch.nn.functional.pad(scores, (1, 0))


def _flip_after(steps: int) -> float:
    return (1 - (1 - 2 * FLIP) ** steps) / 2


def _entropy(flip: float) -> float:
    return float(entr(flip) + entr(1 - flip))


def _losses(law: list[float]) -> np.ndarray:
    """Of blocks of 1 to 4 tokens, from E[log p(x_j | x_{j-1}) - log p(x_j | c)] of tokens 0 to 3."""
    return np.cumsum(law)


def test_bounds_enclose_the_loss_of_blocks():
    x = joints.binary_chain(10, FLIP).sample(600, seed=0)
    exact = _losses([_entropy(_flip_after(j + 1)) - _entropy(FLIP) for j in range(4)])
    few, many = (causal.block_losses(Chain(), x, Rollouts(4, 600, count, seed=0), PARTS) for count in (2, 64))
    for losses in (few, many):
        for loss, value in zip(losses, exact, strict=True):
            assert loss.lower.value - ERRORS * loss.lower.error <= value
            assert value <= loss.upper.value + ERRORS * loss.upper.error
            assert loss.lower.value <= loss.upper.value
    assert (many[0].lower, many[0].upper) == ((0.0, 0.0), (0.0, 0.0)), "a token alone loses nothing"
    assert [loss.block for loss in many] == [1, 2, 3, 4]
    # A mean of m conditionals of .1 and .9 has a relative variance of 2 / m at most; half of it is the bias
    assert many[3].upper.value - many[3].lower.value < 2 * 3 / 64
    assert few[3].upper.value - few[3].lower.value > 0.2, "two rollouts are far too few"


def test_of_data_of_another_law_the_upper_bound_holds():
    """Coin tosses: what the chain is sure of is wrong half of the time, and its blocks lose less than nothing."""
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (600, 8)))

    def score(flip: float) -> float:
        return -float(np.log(flip) + np.log(1 - flip)) / 2

    exact = _losses([score(_flip_after(j + 1)) - score(FLIP) for j in range(3)])
    assert exact[2] < -0.5
    for loss, value in zip(causal.block_losses(Chain(), x, Rollouts(3, 600, 32, 0), PARTS), exact, strict=True):
        assert value - 1e-12 <= loss.upper.value + ERRORS * loss.upper.error


def test_the_profile_from_left_to_right():
    x = joints.binary_chain(6, FLIP).sample(500, seed=1)
    found = causal.left_to_right(Chain(), x, PARTS)
    assert (found.first, tuple(found.score_NT.shape)) == (1, (500, 5))
    for n in range(1, 6):
        value, error = found.at(n, n + 1)
        assert abs(value - _entropy(FLIP)) < ERRORS * error
    assert found.nll.value == pytest.approx(found.at(1, 6).value, abs=1e-12)


def test_rows_know_nothing_of_batches():
    x = joints.binary_chain(9, FLIP).sample(40, seed=2)
    plan = Rollouts(3, 40, 5, seed=1)
    whole, pieces = (causal.block_losses(Chain(), x, plan, Parts(None, {}, batch)) for batch in (40, 7))
    assert whole == pieces


def test_draws_by_the_inverse_cdf():
    log_probs = torch.tensor([0.25, 0.0, 0.5, 0.25], dtype=torch.float64).log()
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    drawn = causal.inverse_cdf(log_probs.expand(6, 4), uniform)
    assert drawn.tolist() == [0, 0, 2, 2, 3, 3], "the impossible token is never drawn"


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Rollouts(9, 8, 2, 0), "--block 9: of sequences of 9 tokens give 2 to 8"),
        (Rollouts(1, 8, 2, 0), "--block 1"),
        (Rollouts(2, 21, 2, 0), "--contexts 21: give 2 to 20"),
    ],
)
def test_blocks_that_cannot_be(plan, words):
    x = torch.zeros(20, 9, dtype=torch.int64)
    with pytest.raises(UserError, match=words):
        causal.block_losses(Chain(), x, plan, PARTS)
