"""The Inception score (Salimans et al., arXiv 1606.03498): exp of the mean KL of p(y | x) from p(y)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from imm_scale.parallel import world


class ClassSums:
    """Count, sum of class probabilities and sum of their entropies, streamed in fp64 and merged over ranks."""

    def __init__(self, classes: int):
        self.count = 0
        self._probability = torch.zeros(classes, dtype=torch.float64)
        self._negative_entropy = torch.zeros((), dtype=torch.float64)

    def add(self, probabilities: Tensor) -> None:
        """Adds (N, K) class probabilities."""
        self.count += len(probabilities)
        self._probability += probabilities.sum(dim=0)
        self._negative_entropy += torch.special.xlogy(probabilities, probabilities).sum()

    def merge_ranks(self) -> "ClassSums":
        """The sums over all ranks."""
        merged = ClassSums(len(self._probability))
        merged.count = int(world.all_sum(torch.tensor(self.count)))
        merged._probability = world.all_sum(self._probability.clone())
        merged._negative_entropy = world.all_sum(self._negative_entropy.clone())
        return merged

    @property
    def score(self) -> float:
        """exp E[KL(p(y|x) || p(y))], from 1 to the number of classes."""
        marginal = self._probability / self.count
        return float((self._negative_entropy / self.count - torch.special.xlogy(marginal, marginal).sum()).exp())


def inception_score(groups: Sequence[ClassSums]) -> tuple[float, float]:
    """Mean over random groups, as published (ten of them), and its standard error."""
    scores = torch.tensor([group.score for group in groups if group.count], dtype=torch.float64)
    return float(scores.mean()), float(scores.std() / len(scores) ** 0.5) if len(scores) > 1 else float("nan")
