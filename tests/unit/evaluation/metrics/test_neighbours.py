"""Precision, recall, density and coverage against loops over the definitions, and known answers."""

import numpy as np
import pytest
import torch

from imm_scale.evaluation.metrics import neighbours
from imm_scale.evaluation.metrics.density_coverage import density_coverage
from imm_scale.evaluation.metrics.precision_recall import precision_recall


def _brute(x: np.ndarray, y: np.ndarray, k: int) -> tuple[float, float, float]:
    """Share of x in the balls of y, balls per x over k, share of balls of y that hold an x."""
    radius = [sorted(np.linalg.norm(a - b) for j, b in enumerate(y) if j != i)[k - 1] for i, a in enumerate(y)]
    inside = np.array([[np.linalg.norm(a - b) <= r for b, r in zip(y, radius, strict=True)] for a in x])
    return inside.any(1).mean(), inside.sum(1).mean() / k, inside.any(0).mean()


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_equal_the_definitions(scale, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", 16)
    generator = np.random.default_rng(0)
    x, y = scale * generator.normal(size=(50, 4)), scale * (0.7 * generator.normal(size=(41, 4)) + 0.5)
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    metrics = precision_recall(a, b)
    assert metrics["precision"][0] == pytest.approx(_brute(x, y, 3)[0], abs=1e-12)
    assert metrics["recall"][0] == pytest.approx(_brute(y, x, 3)[0], abs=1e-12)
    metrics = density_coverage(a, b)
    _, density, coverage = _brute(x, y, 5)
    assert metrics["density"][0] == pytest.approx(density, rel=1e-12)
    assert metrics["coverage"][0] == pytest.approx(coverage, abs=1e-12)


def test_a_set_against_itself_and_far_away():
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(40, 3)))
    same, far = (
        precision_recall(x, x) | density_coverage(x, x),
        precision_recall(x, x + 99) | density_coverage(x, x + 99),
    )
    assert [same[name][0] for name in ("precision", "recall", "coverage")] == [1.0, 1.0, 1.0]
    # Every ball of radius to its k-th neighbour holds its own point and k others.
    assert same["density"][0] == pytest.approx((5 + 1) / 5)
    assert all(far[name][0] == 0.0 for name in far)


def test_errors_are_those_of_a_mean():
    # 3 of 4: sqrt(0.75 * 0.25 / 3), the unbiased standard error of a share.
    assert neighbours.mean_and_error(torch.tensor([1, 1, 1, 0])) == pytest.approx((0.75, 0.25))


def test_nearest_are_the_nearest():
    y = torch.tensor([[0.0], [10.0], [11.0], [5.0]])
    distance, index = neighbours.nearest(torch.tensor([[9.0]]), y, 3)
    assert index.tolist() == [[1, 2, 3]]
    assert distance.tolist() == [[1.0, 2.0, 4.0]]
