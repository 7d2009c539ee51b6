"""The paired Brier score against the sums it estimates."""

import itertools

import numpy as np
import pytest
import torch

from imm_scale.evaluation.tokens import brier, joints
from imm_scale.evaluation.tokens.brier import paired_brier

HANDS = [(i, i) for i in range(4)]
PAIRS = list(itertools.product(range(4), repeat=2))


@pytest.mark.parametrize(
    ("drawn", "expected"), [(HANDS, 0.25), (PAIRS, 0.0625), (HANDS[:1], -0.5)], ids=["truth", "product", "one hand"]
)
def test_four_hands(drawn, expected):
    """Every x with every pair of draws, each once: the mean is the expectation."""
    x, y, other = (torch.tensor(part) for part in zip(*itertools.product(HANDS, drawn, drawn), strict=True))
    # sums of at most 1,024 halves and ones: exact but for one division
    assert paired_brier(x, y, other, [2])[2].value == pytest.approx(expected, abs=1e-12)


def test_windows_are_scored_at_every_place():
    x, y, other = torch.tensor([[0, 1, 2]] * 2), torch.tensor([[0, 1, 0]] * 2), torch.tensor([[1, 1, 2]] * 2)
    scores = paired_brier(x, y, other)
    # tokens: (1 + 0 - 0) + (1 + 1 - 1) + (0 + 1 - 0); pairs: (1 + 0 - 0) + (0 + 1 - 0); triples: none agrees
    assert {window: score.value for window, score in scores.items()} == {1: 1.0, 2: 1.0, 3: 0.0}
    assert brier.geometric_mean(scores) is None
    assert brier.geometric_mean({1: scores[1], 2: scores[2]}) == pytest.approx(1.0)


def test_it_is_unbiased_and_its_error_is_the_spread_of_repeats():
    joint, other = joints.dirichlet(3, 2, seed=1), joints.dirichlet(3, 2, seed=2)
    expected = float((2 * joint.table * other.table - other.table**2).sum())
    repeats = [
        paired_brier(joint.sample(400, 3 * r), other.sample(400, 3 * r + 1), other.sample(400, 3 * r + 2), [3])[3]
        for r in range(100)
    ]
    values = np.array([repeat.value for repeat in repeats])
    assert abs(values.mean() - expected) < 4 * values.std() / 10, "four standard errors of the mean of 100"
    # a standard deviation of 100 values is known to 7 %: three of that
    assert np.mean([repeat.error for repeat in repeats]) == pytest.approx(values.std(), rel=0.21)
