"""The Frechet distance between the Gaussians with the moments of two sets (Dowson and Landau, 1982)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from imm_scale.errors import UserError
from imm_scale.parallel import world

_EPS = torch.finfo(torch.float64).eps


class Gaussian(Protocol):
    """Mean (F,) and covariance (F, F) in fp64."""

    @property
    def mean(self) -> Tensor:
        """(F,) fp64."""

    @property
    def covariance(self) -> Tensor:
        """(F, F) fp64, unbiased."""


@dataclass(frozen=True)
class Given:
    """A Gaussian whose moments were computed elsewhere."""

    mean: Tensor
    covariance: Tensor


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

    @classmethod
    def merged(cls, parts: Sequence["Moments"]) -> "Moments":
        """The moments of several sets together."""
        out = cls(len(parts[0]._mean))
        for part in parts:
            if part.count:
                out._merge(part.count, part._mean, part._scatter)
        return out

    def merge_ranks(self) -> "Moments":
        """The moments of all ranks' vectors together, on every rank."""
        total = int(world.all_sum(torch.tensor(self.count)))
        mean = world.all_sum(self._mean * (self.count / max(total, 1)))
        shift = self._mean - mean
        merged = Moments(len(mean))
        merged.count, merged._mean = total, mean
        merged._scatter = world.all_sum(self._scatter + self.count * torch.outer(shift, shift))
        return merged

    @property
    def mean(self) -> Tensor:
        """(F,) fp64."""
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """(F, F) fp64, unbiased. Raises UserError for fewer than two vectors."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, got {self.count}")
        return self._scatter / (self.count - 1)


@dataclass(frozen=True)
class Root:
    """The symmetric square root of a covariance, and a bound of its error in the spectral norm."""

    matrix: Tensor
    error: float


def square_root(covariance: Tensor) -> Root:
    """Of an (F, F) matrix, by eigenvalues. Those below F eps times the largest are rounding and count as 0.

    The error follows from that of the eigenvalues, delta = F eps lambda_max: ||A^(1/2) - B^(1/2)|| is at most
    ||A - B||^(1/2), and at most ||A - B|| / lambda_min^(1/2) where no eigenvalue is that small.
    """
    values, vectors = torch.linalg.eigh(covariance)
    delta = float(len(values) * _EPS * values[-1].clamp_min(0.0))
    matrix = vectors * _roots(values, delta) @ vectors.T
    least = float(values[0])
    return Root(matrix, delta / least**0.5 if least > delta else delta**0.5)


def _roots(values: Tensor, delta: float) -> Tensor:
    return torch.where(values > delta, values, 0.0).sqrt()


@dataclass(frozen=True)
class Frechet:
    """A distance, and a bound of what rounding in fp64 can have done to it (not what chance did)."""

    value: float
    numerical_error: float


def frechet(a: Gaussian, b: Gaussian, root_b: Root | None = None) -> Frechet:
    """||mu_a - mu_b||^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)).

    The last trace is taken from the eigenvalues of the symmetric B^(1/2) A B^(1/2), which are those of A B: stable for
    singular covariances, where a general matrix square root is not.

    Args:
        root_b: `square_root(b.covariance)`, where it is used again.
    """
    cov_a, cov_b = a.covariance, b.covariance
    root = root_b or square_root(cov_b)
    values = torch.linalg.eigvalsh(root.matrix @ cov_a @ root.matrix)
    delta = float(len(values) * _EPS * values[-1].clamp_min(0.0))
    cross = float(_roots(values, delta).sum())
    shift = float((a.mean - b.mean).square().sum())
    traces = float(cov_a.trace() + cov_b.trace())
    value = shift + traces - 2.0 * cross
    above, below = (values + delta).clamp_min(0.0).sqrt(), (values - delta).clamp_min(0.0).sqrt()
    from_values = float((above - below).sum())
    from_root = root.error * (len(values) * float(cov_a.trace())) ** 0.5  # ||E||_2 ||A^(1/2)||_1
    return Frechet(value, 2.0 * (from_values + from_root) + len(values) * _EPS * (shift + traces))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The value of `frechet` alone."""
    return frechet(a, b).value


def jackknife(groups: Sequence[Moments], b: Gaussian, root_b: Root | None = None) -> float:
    """Standard error of the distance of the groups' union to b, by leaving out a group at a time.

    The groups are random and of about equal size; b is taken as given. Source: Quenouille and Tukey's delete-a-group
    jackknife, variance (g - 1) / g sum (d_i - mean d)^2.
    """
    root = root_b or square_root(b.covariance)
    filled = [group for group in groups if group.count]
    if len(filled) < 2:
        return float("nan")
    left_out = [Moments.merged([*filled[:i], *filled[i + 1 :]]) for i in range(len(filled))]
    values = torch.tensor([frechet(moments, b, root).value for moments in left_out], dtype=torch.float64)
    return float(((len(values) - 1) / len(values) * (values - values.mean()).square().sum()).sqrt())
