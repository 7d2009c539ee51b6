"""The kernel distance against the definition, term by term, and torchmetrics; its error against repeated draws."""

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from imm_scale.evaluation.metrics import kid
from imm_scale.evaluation.metrics.kid import kernel_distance


def _by_definition(x: np.ndarray, y: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((np.dot(a, b) / len(a) + 1.0) ** 3)

    n, m = len(x), len(y)
    xx = np.mean([k(x[i], x[j]) for i in range(n) for j in range(n) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(m) for j in range(m) if i != j])
    return float(xx + yy - 2.0 * np.mean([k(a, b) for a in x for b in y]))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize(("n", "m", "dim"), [(20, 31, 3), (12, 12, 40)])
def test_equals_the_definition(scale, n, m, dim, monkeypatch):
    monkeypatch.setattr(kid, "_BLOCK", 7)
    generator = np.random.default_rng(0)
    x, y = scale * generator.normal(size=(n, dim)), scale * (0.5 + generator.normal(size=(m, dim)))
    distance = kernel_distance(torch.from_numpy(x), torch.from_numpy(y)).value
    # Sums of a thousand fp64 terms that partly cancel.
    assert distance == pytest.approx(_by_definition(x, y), rel=1e-8, abs=1e-10)


def test_equals_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    x, y = (shift + torch.randn(200, 16, generator=generator, dtype=torch.float64) for shift in (0.0, 0.4))
    assert kernel_distance(x, y).value == pytest.approx(float(poly_mmd(x, y)), rel=1e-6)


def test_a_shifted_set():
    """k is (xy + 1)^3 in one dimension: of two points each, all at 0 and all at 1, 1 + 8 - 2."""
    x, y = torch.zeros(3, 1), torch.ones(3, 1)
    assert kernel_distance(x, y).value == pytest.approx(7.0, rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_unbiased_and_the_error_is_that_of_repeated_draws(shift):
    generator = torch.Generator().manual_seed(1)
    estimates = [
        kernel_distance(torch.randn(60, 8, generator=generator), shift + torch.randn(80, 8, generator=generator))
        for _ in range(300)
    ]
    values, errors = np.array([f.value for f in estimates]), np.array([f.error for f in estimates])
    if shift == 0.0:
        # Unbiased: the mean of 300 is 0 within three of its standard errors.
        assert abs(values.mean()) < 3 * values.std() / np.sqrt(300)
    # The standard deviation of 300 values is known to 4 %; their tail is heavier than a Gaussian's.
    assert 0.8 < np.sqrt(np.mean(errors**2)) / values.std() < 1.25
