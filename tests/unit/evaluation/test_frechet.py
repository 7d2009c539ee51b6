"""Frechet distances against closed forms and scipy's general matrix square root."""

import numpy as np
import pytest
import scipy.linalg
import torch

from imm_scale.errors import UserError
from imm_scale.evaluation.frechet import Moments, frechet_distance
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


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_equals_scipy(scale):
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(12, 12))
    a = scale * (generator.normal(size=(400, 12)) @ mixing + 5.0)
    b = scale * generator.normal(size=(300, 12))
    # Two ways to a square root, in fp64, of covariances of condition about 1e4.
    assert frechet_distance(_moments(a), _moments(b)) == pytest.approx(_scipy_frechet(a, b), rel=1e-8)


def test_known_gaussians():
    # N(0, 4) against N(3, 1) along one axis: 9 + 4 + 1 - 2 * 2 = 10; the moments are set exactly by two points.
    a, b = np.array([[-np.sqrt(2)], [np.sqrt(2)]]), 3.0 + np.array([[-np.sqrt(0.5)], [np.sqrt(0.5)]])
    assert frechet_distance(_moments(a), _moments(b)) == pytest.approx(10.0, rel=1e-12)


def test_itself_and_a_shift_also_when_rank_deficient():
    features = np.random.default_rng(1).normal(size=(10, 30))
    # The square roots of eigenvalues that are 0 but for rounding (1e-16) are 1e-8 each.
    assert frechet_distance(_moments(features), _moments(features)) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(_moments(features), _moments(features + 2.0)) == pytest.approx(120.0, abs=1e-6)


@pytest.mark.parametrize("chunks", [1, 7, 50])
def test_moments_are_numpys_in_any_chunking(chunks):
    features = 1e3 + np.random.default_rng(2).normal(size=(50, 5))
    moments = _moments(features, chunks)
    np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False), rtol=1e-9)


def _merged(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from imm_scale import distributed

    world = distributed.detect()
    distributed.init(world)
    part = np.array_split(features, world.size)[world.rank]
    moments = _moments(part).merge_ranks()
    return moments.mean.numpy(), moments.covariance.numpy()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_merge_to_the_moments_of_all(size):
    features = 1e3 + np.random.default_rng(3).normal(size=(41, 4))
    for mean, covariance in ranks.run(_merged, size, features):
        np.testing.assert_allclose(mean, features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-9)


def test_one_sample_has_no_covariance():
    with pytest.raises(UserError, match="at least 2 samples, got 1"):
        _ = _moments(np.zeros((1, 3))).covariance
