"""The kernel distance: the unbiased squared maximum mean discrepancy with a cubic kernel of features.

Binkowski et al., "Demystifying MMD GANs", arXiv 1801.01401: k(x, y) = (x . y / F + 1)^3. Unlike the Frechet distance it
has no bias from the number of samples; it may come out below 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1024  # rows of the kernel matrix at once


@dataclass(frozen=True)
class Estimate:
    value: float
    error: float


@dataclass
class _Sums:
    """Of one kernel matrix (n, m) without the diagonal where x is y: per row, per column, and of squares."""

    rows: Tensor
    columns: Tensor
    squares: float


def _kernel_sums(x: Tensor, y: Tensor, same: bool) -> _Sums:
    rows, columns, squares = torch.zeros(len(x)).double(), torch.zeros(len(y)).double(), 0.0
    for start in range(0, len(x), _BLOCK):
        block = (x[start : start + _BLOCK] @ y.T / x.shape[1] + 1.0) ** 3
        if same:
            index = torch.arange(len(block))
            block[index, start + index] = 0.0
        rows[start : start + _BLOCK] = block.sum(dim=1)
        columns += block.sum(dim=0)
        squares += float(block.square().sum())
    return _Sums(rows, columns, squares)


def kernel_distance(x: Tensor, y: Tensor) -> Estimate:
    """MMD^2 of (n, F) and (m, F) features with its standard error; n and m at least 3.

    The error is that of a two-sample U statistic: 4 Var(h_x) / n + 4 Var(h_y) / m from the projections
    h_x(i) = mean_j k(x_i, x_j) - mean_j k(x_i, y_j), plus the second-order term, which alone is left where both sets
    have one distribution. The projections are means over a finite set; their own noise adds twice the second-order term
    to the first, which is taken off.
    """
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    xx, yy, xy = _kernel_sums(x, x, True), _kernel_sums(y, y, True), _kernel_sums(x, y, False)
    mean_xx, mean_yy = float(xx.rows.sum()) / (n * (n - 1)), float(yy.rows.sum()) / (m * (m - 1))
    mean_xy = float(xy.rows.sum()) / (n * m)
    h_x = xx.rows / (n - 1) - xy.rows / m
    h_y = yy.rows / (m - 1) - xy.columns / n
    second = (
        2.0 / n**2 * _degenerate(xx.squares / (n * (n - 1)), xx.rows / (n - 1), xx.rows / (n - 1), mean_xx)
        + 2.0 / m**2 * _degenerate(yy.squares / (m * (m - 1)), yy.rows / (m - 1), yy.rows / (m - 1), mean_yy)
        + 4.0 / (n * m) * _degenerate(xy.squares / (n * m), xy.rows / m, xy.columns / n, mean_xy)
    )
    first = 4.0 * float(h_x.var()) / n + 4.0 * float(h_y.var()) / m
    return Estimate(mean_xx + mean_yy - 2.0 * mean_xy, max(first - second, second) ** 0.5)


def _degenerate(mean_square: float, rows: Tensor, columns: Tensor, mean: float) -> float:
    """Variance of the kernel once its row and column means are taken off."""
    return max(0.0, mean_square - mean**2 - float(rows.var()) - float(columns.var()))
