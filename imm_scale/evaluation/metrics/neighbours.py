"""Nearest neighbours among features, block by block."""

import torch
from torch import Tensor

_BLOCK = 512


def distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, m) Euclidean distances of (n, F) and (m, F); differences are taken before squaring, so none is lost."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def radii(x: Tensor, k: int) -> Tensor:
    """Distance of each of (n, F) to its k-th nearest neighbour among the others."""
    # The nearest of all is the point itself, at distance 0.
    return torch.cat([distances(block, x).kthvalue(k + 1, dim=1).values for block in x.split(_BLOCK)])


def nearest(x: Tensor, y: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Distances and indices (n, k) of the k nearest of y (m, F) to each of x (n, F), nearest first."""
    nearest_of_block = [distances(block, y).topk(k, dim=1, largest=False) for block in x.split(_BLOCK)]
    return torch.cat([f.values for f in nearest_of_block]), torch.cat([f.indices for f in nearest_of_block])


def balls(x: Tensor, y: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Of the balls of `radius` (m,) around y (m, F): how many each x (n, F) lies in, and how many x each holds."""
    inside, holds = [], torch.zeros(len(y), dtype=torch.int64)
    for block in x.split(_BLOCK):
        hits = distances(block, y) <= radius
        inside.append(hits.sum(dim=1))
        holds += hits.sum(dim=0)
    return torch.cat(inside), holds


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of (n,) values, and its standard error with the other set taken as given."""
    values = values.double()
    return float(values.mean()), float(values.std() / len(values) ** 0.5)
