"""Precision and recall of samples (Kynkaanniemi et al., arXiv 1904.06991), with k = 3 neighbours."""

from torch import Tensor

from imm_scale.evaluation.metrics import neighbours

K = 3


def precision_recall(samples: Tensor, reference: Tensor, k: int = K) -> dict[str, tuple[float, float]]:
    """Share of samples (n, F) on the reference's manifold, and of the reference (m, F) on theirs; each with its error.

    A set's manifold is the union of the balls around its points that reach to their k-th nearest neighbours.
    """
    precision = neighbours.balls(samples, reference, neighbours.radii(reference, k))[0] > 0
    recall = neighbours.balls(reference, samples, neighbours.radii(samples, k))[0] > 0
    return {
        "precision": neighbours.mean_and_error(precision),
        "recall": neighbours.mean_and_error(recall),
    }
