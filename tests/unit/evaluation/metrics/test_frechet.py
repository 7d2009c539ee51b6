"""Frechet distances against closed forms, scipy's general matrix square root on full data, and torchmetrics."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import _compute_fid

from imm_scale.errors import UserError
from imm_scale.evaluation.metrics.frechet import Given, Moments, frechet, frechet_distance, jackknife, square_root
from tests import ranks


def _moments(features: np.ndarray, chunks: int = 1) -> Moments:
    moments = Moments(features.shape[1])
    for chunk in np.array_split(features, chunks):
        moments.add(torch.from_numpy(chunk))
    return moments


def _scipy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    shift = a.mean(0) - b.mean(0)
    return float(shift @ shift + np.trace(cov_a + cov_b - 2 * root.real))


def _sets(kind: str) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(12, 12))
    a, b = generator.normal(size=(400, 12)) @ mixing + 5.0, generator.normal(size=(300, 12))
    if kind == "rank_deficient":
        return a[:6], b[:8]
    if kind == "huge":
        return 1e8 * a, 1e8 * b
    return (1e-3 * a, 1e-3 * b) if kind == "small" else (a, b)


@pytest.mark.parametrize("kind", ["random", "small", "huge", "rank_deficient"])
def test_equals_scipy_and_torchmetrics(kind):
    a, b = _sets(kind)
    ours = frechet_distance(_moments(a), _moments(b))
    # scipy takes the root of a general, here nearly defective, matrix: its own rounding is the tolerance.
    assert ours == pytest.approx(_scipy_frechet(a, b), rel=1e-6)
    statistics = [torch.from_numpy(np.asarray(m)) for x in (a, b) for m in (x.mean(0), np.cov(x, rowvar=False))]
    assert ours == pytest.approx(float(_compute_fid(*statistics)), rel=1e-6)


def test_known_gaussians():
    # N(0, 4) against N(3, 1) along one axis: 9 + 4 + 1 - 2 * 2 = 10; the moments are set exactly by two points.
    a, b = np.array([[-np.sqrt(2)], [np.sqrt(2)]]), 3.0 + np.array([[-np.sqrt(0.5)], [np.sqrt(0.5)]])
    assert frechet_distance(_moments(a), _moments(b)) == pytest.approx(10.0, rel=1e-12)


def test_known_commuting_gaussians():
    # For commuting covariances the distance is |shift|^2 + sum (sqrt a_i - sqrt b_i)^2.
    turn = np.linalg.qr(np.random.default_rng(4).normal(size=(5, 5)))[0]
    a, b, shift = np.array([4.0, 9, 1, 0, 25]), np.array([1.0, 16, 1, 4, 0]), np.arange(5.0)
    gaussians = [
        Given(torch.from_numpy(mean), torch.from_numpy(turn @ np.diag(values) @ turn.T))
        for mean, values in ((0 * shift, a), (shift, b))
    ]
    # sqrt of 4 - 1, 9 - 16, ...: 1 + 1 + 0 + 4 + 25, and the shift's 30.
    assert frechet_distance(*gaussians) == pytest.approx(61.0, rel=1e-12)


def test_itself_and_a_shift_also_when_rank_deficient():
    features = np.random.default_rng(1).normal(size=(10, 30))
    # Eigenvalues that are 0 but for rounding count as 0, so what is left is rounding of the traces.
    assert frechet_distance(_moments(features), _moments(features)) == pytest.approx(0.0, abs=1e-11)
    assert frechet_distance(_moments(features), _moments(features + 2.0)) == pytest.approx(120.0, abs=1e-11)


@pytest.mark.parametrize("dim", [3, 30, 200])
def test_the_stated_rounding_error_holds(dim):
    """Against the closed form of commuting covariances with eigenvalues over many orders of magnitude."""
    generator = np.random.default_rng(dim)
    turn = np.linalg.qr(generator.normal(size=(dim, dim)))[0]
    a, b = 10.0 ** generator.uniform(-14, 4, dim), 10.0 ** generator.uniform(-14, 4, dim)
    exact = float(((np.sqrt(a) - np.sqrt(b)) ** 2).sum())
    zero = torch.zeros(dim, dtype=torch.float64)
    distance = frechet(*(Given(zero, torch.from_numpy(turn @ np.diag(values) @ turn.T)) for values in (a, b)))
    assert abs(distance.value - exact) <= distance.numerical_error
    assert distance.numerical_error < 1e-3 * exact, "and it says something"


def test_the_root_is_a_root():
    a = _moments(_sets("random")[0]).covariance
    root = square_root(a)
    torch.testing.assert_close(root.matrix @ root.matrix, a, rtol=1e-12, atol=1e-12)
    assert torch.equal(root.matrix, root.matrix.T) or torch.allclose(root.matrix, root.matrix.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize("chunks", [1, 7, 50])
def test_moments_are_numpys_in_any_chunking(chunks):
    features = 1e3 + np.random.default_rng(2).normal(size=(50, 5))
    moments = _moments(features, chunks)
    np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False), rtol=1e-9)


def _merged(features: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    from imm_scale.parallel import world as distributed

    world = distributed.detect()
    distributed.init(world)
    part = scale * np.array_split(features, world.size)[world.rank]
    moments = _moments(part, chunks=world.rank + 1).merge_ranks()
    return moments.mean.numpy(), moments.covariance.numpy()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_merge_to_the_moments_of_all(size):
    features = 1e3 + np.random.default_rng(3).normal(size=(41, 4))
    for mean, covariance in ranks.run(_merged, size, features, 1e6):
        np.testing.assert_allclose(mean, 1e6 * features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, 1e12 * np.cov(features, rowvar=False), rtol=1e-9)


def test_merged_parts_are_the_whole_and_empty_ones_do_no_harm():
    features = np.random.default_rng(5).normal(size=(30, 3))
    parts = [_moments(features[:7]), Moments(3), _moments(features[7:])]
    np.testing.assert_allclose(Moments.merged(parts).covariance, np.cov(features, rowvar=False), rtol=1e-12)


def test_the_jackknife_says_how_much_the_distance_varies():
    generator = np.random.default_rng(6)
    mixing = generator.normal(size=(4, 4))
    target = _moments(generator.normal(size=(5000, 4)))
    values, errors = [], []
    for _ in range(60):
        drawn = generator.normal(size=(500, 4)) @ mixing + 0.3
        groups = [_moments(part) for part in np.array_split(drawn, 10)]
        values.append(frechet_distance(Moments.merged(groups), target))
        errors.append(jackknife(groups, target))
    # The standard deviation of 60 values is known to 9 %, the mean of 60 jackknives of 9 degrees of freedom to 3 %.
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values, ddof=1), rel=0.3)


def test_one_sample_has_no_covariance():
    with pytest.raises(UserError, match="at least 2 samples, got 1"):
        _ = _moments(np.zeros((1, 3))).covariance
