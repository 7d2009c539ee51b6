"""Density and coverage of samples (Naeem et al., arXiv 2002.09797), with k = 5 neighbours."""

from torch import Tensor

from imm_scale.evaluation.metrics import neighbours

K = 5


def density_coverage(samples: Tensor, reference: Tensor, k: int = K) -> dict[str, tuple[float, float]]:
    """Each with its error.

    Density: balls of the reference (m, F) that a sample (n, F) lies in, over k. Coverage: share of those balls that
    hold a sample. The balls reach to the k-th nearest neighbour within the reference.
    """
    inside, holds = neighbours.balls(samples, reference, neighbours.radii(reference, k))
    return {
        "density": neighbours.mean_and_error(inside.double() / k),
        "coverage": neighbours.mean_and_error(holds > 0),
    }
