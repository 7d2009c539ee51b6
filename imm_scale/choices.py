"""What a config chooses by name: the settings of a method, a backbone, a sample space or a metric.

Each registered class has a `Config`, a frozen dataclass derived from one of the four below, whose fields are made by
`option`. Its keys exist in a run's config where the section's `name` is that of the class.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self


def option(default: Any, help: str) -> Any:
    """A field of a config with its sentence; mutable defaults are copied for each instance."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Passes:
    """Forward passes of one training sample in a step, each costing what the net's forward costs, backward twice that.

    Attributes:
        grad: with gradient.
        no_grad: without.
        tangent: what derivatives along a tangent cost beside the passes they belong to.
    """

    grad: float = 1
    no_grad: float = 0
    tangent: float = 0

    @property
    def forwards(self) -> float:
        """Forward passes' worth of work, the backward passes included."""
        return 3 * self.grad + self.no_grad + self.tangent


@dataclass(frozen=True)
class Choice:
    """Settings of one registered class; `name` says which."""

    name: str = option("", "Which registered class; its other keys stand beside the name.")

    def validate(self) -> None:
        """Raises UserError, naming keys from the section on, where values do not fit together."""


@dataclass(frozen=True)
class MethodConfig(Choice):
    """Settings of a method: how to sample, and what to minimize.

    Attributes:
        MAX_ZERO_STAGE: the last ZeRO stage it can be trained at.
        WHY_NOT_BEYOND: what keeps it from the next.
    """

    MAX_ZERO_STAGE: ClassVar[int] = 3
    WHY_NOT_BEYOND: ClassVar[str] = ""

    @property
    def group_size(self) -> int:
        """Samples that must stay together on one rank."""
        return 1

    @property
    def passes(self) -> Passes:
        """What a step costs in passes of the net."""
        return Passes()

    def passes_at(self, alignment: int) -> Passes:
        """The same where micro-batches start and end at multiples of so many groups, which may spare some passes."""
        return self.passes

    @property
    def has_second_time(self) -> bool:
        """Whether the net is told where to land, beside where it stands."""
        return False

    def resolved(self, precision: str) -> Self:
        """With nothing left open that follows from other settings. What is resolved travels with the weights."""
        return self

    def unlike(self, source: "MethodConfig") -> dict[str, tuple[Any, Any]]:
        """What a net trained with `source` takes or answers otherwise than here: {key below `method`: (there, here)}.

        Settings of a loss alone are not among it: weights can go on from one loss to another.
        """
        return {} if source.name == self.name else {"name": (source.name, self.name)}


@dataclass(frozen=True)
class BackboneConfig(Choice):
    """Settings of a backbone, before it is known what it is to fit."""

    @property
    def title(self) -> str:
        """What people call the net, for pages and plans."""
        return self.name


@dataclass(frozen=True)
class SpaceConfig(Choice):
    """Settings of a sample space, beside what the manifest says."""


@dataclass(frozen=True)
class MetricConfig(Choice):
    """Settings of a metric."""
