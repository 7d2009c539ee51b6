"""The Frechet distance between the Gaussians with the moments of two sets (Dowson and Landau, 1982)."""

import torch
from torch import Tensor

from imm_scale import distributed
from imm_scale.errors import UserError


class Moments:
    """Count, mean and scatter of feature vectors, streamed in fp64 and merged over ranks."""

    def __init__(self, dim: int):
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Adds (N, F) features, by Chan's pairwise update: no cancellation for means far from 0."""
        count = features.shape[0]
        if count == 0:
            return
        mean = features.mean(dim=0)
        centred = features - mean
        self._merge(count, mean, centred.T @ centred)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        shift = mean - self._mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self._mean += shift * (count / total)
        self.count = total

    def merge_ranks(self) -> "Moments":
        """The moments of all ranks' vectors together, on every rank."""
        total = int(distributed.all_sum(torch.tensor(self.count)))
        mean = distributed.all_sum(self._mean * (self.count / total))
        shift = self._mean - mean
        merged = Moments(len(mean))
        merged.count, merged._mean = total, mean
        merged._scatter = distributed.all_sum(self._scatter + self.count * torch.outer(shift, shift))
        return merged

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """Unbiased. Raises UserError for fewer than two vectors."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """||mu_a - mu_b||^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)).

    The last trace is taken from the eigenvalues of the symmetric A^(1/2) B A^(1/2), which are those of A B: stable
    for singular covariances, where a general matrix square root is not.
    """
    cov_a, cov_b = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0.0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0.0).sqrt().sum()
    shift = (a.mean - b.mean).square().sum()
    return float(shift + cov_a.trace() + cov_b.trace() - 2.0 * cross)
