"""Grouped maximum mean discrepancy: the bracket of eq 67 for a choice of kernels.

Legend: G groups, M particles in a group, D elements of a particle.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from imm_scale.errors import UserError

_MIN_DISTANCE = 1e-8  # of the laplace kernel (app C.4): keeps the gradient of the norm finite on the diagonal
_PSEUDO_HUBER_C = 0.03


def _distances(x_GMD: Tensor, y_GMD: Tensor) -> Tensor:
    """(G, M, M) Euclidean distances by explicit difference: the Gram trick would give negative losses."""
    return torch.linalg.vector_norm(x_GMD[:, :, None, :] - y_GMD[:, None, :, :], dim=-1)


def _laplace(distance: Tensor, bandwidth: Tensor, dim: int) -> Tensor:
    return torch.expm1(-bandwidth * distance.clamp_min(_MIN_DISTANCE) / dim)


def _rbf(distance: Tensor, bandwidth: Tensor, dim: int) -> Tensor:
    return torch.expm1(-bandwidth * distance**2 / (2 * dim))


def _energy(distance: Tensor, bandwidth: Tensor, dim: int) -> Tensor:
    return -(distance**2)


def _pseudo_huber(distance: Tensor, bandwidth: Tensor, dim: int) -> Tensor:
    # c - sqrt(d^2 + c^2), without the cancellation at small d
    return -(distance**2) / (_PSEUDO_HUBER_C + torch.sqrt(distance**2 + _PSEUDO_HUBER_C**2))


# k(x, y) - k(x, x) rather than k: the constant drops out of the bracket, whose weights sum to 0, and expm1 keeps the
# small differences that exp would round away. A plugin adds its own here: (distance, bandwidth, D) to that difference.
KERNELS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "laplace": _laplace,
    "rbf": _rbf,
    "energy": _energy,
    "pseudo_huber": _pseudo_huber,
}


def grouped_mmd(y_t_GMD: Tensor, y_r_GMD: Tensor, bandwidth_G: Tensor, kernel: str = "laplace") -> Tensor:
    """Squared MMD of each group as a V-statistic (the bracket of eq 67 over M^2, j = k included).

    Args:
        y_t_GMD: (G, M, D) particles with gradient, fp32 or fp64.
        y_r_GMD: (G, M, D) target particles.
        bandwidth_G: (G,) w~ = 1 / |c_out(s, t)|; `energy` and `pseudo_huber` ignore it.
        kernel: a name of `KERNELS`.

    Returns:
        (G,) fp64.

    Raises:
        UserError: unknown kernel.
    """
    if kernel not in KERNELS:
        raise UserError(f"kernel {kernel!r} is unknown; choose one of {', '.join(KERNELS)}")
    # In fp64 from here on: the three terms of the bracket nearly cancel, and beside the network this costs nothing.
    y_t_GMD, y_r_GMD = y_t_GMD.double(), y_r_GMD.double()
    pairs = (y_t_GMD, y_t_GMD), (y_r_GMD, y_r_GMD), (y_t_GMD, y_r_GMD)
    distance_3GMM = torch.stack([_distances(x, y) for x, y in pairs])
    bandwidth = bandwidth_G.double()[:, None, None]
    within_t, within_r, across = KERNELS[kernel](distance_3GMM, bandwidth, y_t_GMD.shape[-1]).mean(dim=(2, 3))
    return within_t + within_r - 2.0 * across
