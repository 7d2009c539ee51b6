"""What a metric is: a comparison of two sets of features, with its error and its direction."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from imm_scale.choices import MetricConfig
from imm_scale.evaluation.metrics.frechet import Gaussian, Moments, Root
from imm_scale.evaluation.metrics.inception_score import ClassSums

Need = Literal["moments", "vectors", "logits", "spatial"]


class Measure(NamedTuple):
    """A value, its standard error, what fp64 rounding can have done to it where that is known, and its direction."""

    value: float
    error: float
    numerical_error: float | None = None
    higher_is_better: bool = False


class Samples(Protocol):
    """Features of the samples of all ranks.

    Attributes:
        groups: moments of each random group.
        kept: (K, F) features of some samples.
        classes: class sums of each random group, or none.
        spatial_groups: moments of each random group's features with places, or none.
    """

    @property
    def groups(self) -> list[Moments]:
        """Moments of each of the groups that the jackknife leaves out in turn."""

    @property
    def kept(self) -> Tensor:
        """Feature vectors, (n, F)."""

    @property
    def classes(self) -> Sequence[ClassSums]:
        """Sums of class probabilities, group by group; none for an extractor without a classifier."""

    @property
    def moments(self) -> Moments:
        """Moments of all samples."""

    @property
    def spatial_groups(self) -> list[Moments]:
        """As `groups`, of features with places; none for an extractor without them."""


class Target(Protocol):
    """Features that samples are compared with; `kept` and `spatial` are None where there are none."""

    @property
    def mean(self) -> Tensor:
        """(F,) fp64 mean of the features."""

    @property
    def covariance(self) -> Tensor:
        """(F, F) fp64 covariance of the features, unbiased."""

    @property
    def root(self) -> Root:
        """Square root of the covariance, taken once."""

    @property
    def kept(self) -> Tensor | None:
        """Feature vectors, (n, F)."""

    @property
    def spatial(self) -> Gaussian | None:
        """Moments of features with places."""


class Metric(ABC):
    """One way to compare samples with a reference. Built from its own Config.

    Attributes:
        needs: what of the features it looks at: their moments, the vectors themselves, class logits, or places.
        higher_is_better: the direction of all values it gives.
        standard_names: {value's name: its name} under the network of published numbers, where custom has one.
    """

    Config: ClassVar[type[MetricConfig]]
    needs: ClassVar[frozenset[Need]]
    higher_is_better: ClassVar[bool]
    standard_names: ClassVar[dict[str, str]] = {}

    def __init__(self, config: MetricConfig):
        self.config = config

    @abstractmethod
    def measure(self, samples: Samples, reference: Target, with_error: bool = True) -> dict[str, Measure]:
        """{name: measure}; names get the extractor's behind them.

        Args:
            with_error: whether errors that take much longer than the value are wanted; else they are NaN.
        """
