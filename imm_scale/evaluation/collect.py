"""What is kept of many samples' features: moments by random groups, class sums, and the vectors of a random subset."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from imm_scale import rng
from imm_scale.errors import UserError
from imm_scale.evaluation.extractors import Output
from imm_scale.evaluation.metrics.frechet import Moments
from imm_scale.evaluation.metrics.inception_score import ClassSums
from imm_scale.parallel import world

# Random groups, for error bars. Not index mod 10: labels go round in steps, and a group would be a class.
GROUPS = 10


def group_of(index: Tensor) -> Tensor:
    """Which of the GROUPS each of (n,) samples belongs to: a function of its number alone."""
    return rng.random_bits(0, "group", index) % GROUPS


def chosen(num: int, most: int) -> Tensor:
    """Ascending numbers, (K,), of the samples whose features are kept: all of `num`, or `most` of them at random."""
    if num <= most:
        return torch.arange(num)
    return rng.random_bits(0, "kept_features", torch.arange(num)).argsort(stable=True)[:most].sort().values


@dataclass(frozen=True)
class Features:
    """Of all samples of all ranks.

    Attributes:
        groups: moments of each random group.
        kept: (K, F) fp32 features of the chosen samples.
        classes: class sums of each random group, or none.
        spatial_groups: moments of each random group's features with places, or none.
    """

    groups: list[Moments]
    kept: Tensor
    classes: list[ClassSums]
    spatial_groups: list[Moments] = field(default_factory=list)

    @property
    def moments(self) -> Moments:
        """Moments of all samples, the groups merged."""
        return Moments.merged(self.groups)


class Collector:
    """Takes this rank's samples in any order and batches.

    Args:
        num: samples of all ranks together.
        most: most vectors kept.
        what: named in messages, such as "sample" or "training image".
    """

    def __init__(self, num: int, most: int, what: str = "sample"):
        self._what = what
        self._chosen = chosen(num, most)
        self._groups: list[Moments] = []
        self._classes: list[ClassSums] = []
        self._spatial: list[Moments] = []
        self._kept = torch.zeros(0, 0)

    def _start(self, dim: int, classes: int, spatial: int) -> None:
        self._groups = [Moments(dim) for _ in range(GROUPS)]
        self._classes = [ClassSums(classes) for _ in range(GROUPS if classes else 0)]
        self._spatial = [Moments(spatial) for _ in range(GROUPS if spatial else 0)]
        self._kept = torch.zeros(len(self._chosen), dim)

    def add(self, index: Tensor, output: Output) -> None:
        """Takes samples (n,) and what the extractor says of them; features that are not finite raise UserError."""
        self._check_finite(index, output)
        if not self._groups:
            self._start(*(0 if part is None else part.shape[1] for part in _parts(output)))
        group = group_of(index)
        for sums, values in zip((self._groups, self._classes, self._spatial), _parts(output), strict=True):
            for number in range(GROUPS if values is not None else 0):
                sums[number].add(values[group == number])  # type: ignore[index]
        is_chosen = torch.isin(index, self._chosen)
        self._kept[torch.searchsorted(self._chosen, index[is_chosen])] = output.features[is_chosen].float()

    def _check_finite(self, index: Tensor, output: Output) -> None:
        for values in (output.features, output.spatial):
            finite = torch.ones(1, dtype=torch.bool) if values is None else torch.isfinite(values).all(dim=1)
            if not finite.all():
                raise UserError(
                    f"features of {self._what} {int(index[~finite][0])} are not finite: look at that image, and at the "
                    "extractor's input range"
                )

    def merge_ranks(self) -> Features:
        """Of all ranks, on every rank; some ranks may have had no samples."""
        sizes = [len(groups[0].mean) if groups else 0 for groups in (self._groups, self._spatial)]
        classes = len(self._classes[0]._probability) if self._classes else 0
        dims = _most(torch.tensor([sizes[0], classes, sizes[1]])).tolist()
        if not self._groups:
            self._start(*dims)
        return Features(
            groups=[group.merge_ranks() for group in self._groups],
            kept=world.all_sum(self._kept),
            classes=[sums.merge_ranks() for sums in self._classes],
            spatial_groups=[group.merge_ranks() for group in self._spatial],
        )


def _parts(output: Output) -> tuple[Tensor | None, ...]:
    """In the order of `Collector._start`."""
    return output.features, output.probabilities, output.spatial


def _most(values: Tensor) -> Tensor:
    """Greatest over ranks, of values that are alike or 0."""
    nonzero = world.all_sum((values > 0).long())
    return world.all_sum(values.clone()) // nonzero.clamp_min(1)
