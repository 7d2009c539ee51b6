"""What a config chooses by name: the settings of a method, a backbone, a sample space or a metric.

Each registered class has a `Config`, a frozen dataclass derived from one of the four below, whose fields are made by
`option`. Its keys exist in a run's config where the section's `name` is that of the class.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from imm_scale.errors import UserError


@dataclass(frozen=True)
class Interval:
    """The numbers a key may have, in the usual notation: [0, 1) holds 0 and not 1. No interval holds nan or inf."""

    text: str

    def __post_init__(self) -> None:
        assert re.fullmatch(r"[\[(]\S+, \S+[\])]", self.text), self.text
        assert self.low <= self.high, self.text

    @property
    def low(self) -> float:
        """The lower end."""
        return _number(self.text[1:].partition(", ")[0])

    @property
    def high(self) -> float:
        """The upper end."""
        return _number(self.text[:-1].partition(", ")[2])

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.text.startswith("[") else value > self.low
        below = value <= self.high if self.text.endswith("]") else value < self.high
        return above and below


def _number(text: str) -> float:
    """An integer where the text is one: a float has 53 bits."""
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


ANY_NUMBER, ANY_LENGTH = Interval("(-inf, inf)"), Interval("[0, inf)")


def option(
    default: Any, help: str, *, range: str = ANY_NUMBER.text, length: str = ANY_LENGTH.text, is_path: bool = False
) -> Any:
    """A field of a config with its sentence; mutable defaults are copied for each instance.

    Args:
        range: the interval that a number, or each number of a list, must lie in.
        length: the interval that the number of a list's items must lie in.
        is_path: a file or a folder, whose leading ~ stands for the user's home.
    """
    about = {"help": help, "range": Interval(range), "length": Interval(length), "is_path": is_path}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=about)
    return field(default=default, metadata=about)


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
        SAMPLERS: those of `sampling.sampler` that its nets can be drawn by; `auto` stands for the first.
        tangents_are_live: derivatives carry a gradient, and flow matching is a pass of its own beside them.
    """

    MAX_ZERO_STAGE: ClassVar[int] = 3
    WHY_NOT_BEYOND: ClassVar[str] = ""
    SAMPLERS: ClassVar[tuple[str, ...]] = ("pushforward", "restart", "pushforward_restart", "heun")

    @property
    def group_size(self) -> int:
        """Samples that must stay together on one rank."""
        return 1

    @property
    def replicas(self) -> int:
        """Times a sample goes through branches that are apart from the transformer, which it goes through once."""
        return 1

    @property
    def passes(self) -> Passes:
        """What a step costs in passes of the net."""
        return Passes()

    def passes_at(self, alignment: int) -> Passes:
        """The same where micro-batches start and end at multiples of so many groups, which may spare some passes."""
        return self.passes

    def spared(self, alignment: int) -> str:
        """What micro-batches of whole strata would spare of that, in words; "" where there is nothing to spare."""
        least = min(self.passes_at(size).forwards for size in (1, 2, 4, 8))
        if self.passes_at(alignment).forwards <= least:
            return ""
        return f"; {least:.4g} where every rank's micro-batches are multiples of 4 groups"

    def sampler_named(self, name: str) -> str:
        """The sampler that `sampling.sampler` means for this method. Raises UserError for one of other nets."""
        chosen = self.SAMPLERS[0] if name == "auto" else name
        if chosen not in self.SAMPLERS:
            raise UserError(
                f"sampling.sampler={name} does not draw from a net of method.name={self.name}: choose one of "
                f"{', '.join(self.SAMPLERS)}, or auto"
            )
        return chosen

    def check_sampler(self, sampler: str, steps: Sequence[int]) -> None:
        """Raises UserError, naming the remedy, where one of the step counts asks the net for jumps it never learns."""

    @property
    def has_second_time(self) -> bool:
        """Whether the net is told where to land, beside where it stands."""
        return False

    def resolved(self, precision: str) -> Self:
        """With nothing left open that follows from other settings. What is resolved travels with the weights."""
        return self

    @property
    def tells_guidance(self) -> bool:
        """Whether the net is told the scale and the interval of its guidance, and samples are one pass a step."""
        return False

    def check_guidance(self, scale: float, interval: Sequence[float]) -> None:
        """Raises UserError, naming the remedy, for guidance of samples that the net was never told."""

    tangents_are_live: ClassVar[bool] = False

    @property
    def takes_tangents(self) -> bool:
        """Whether the net is differentiated along a tangent of its inputs."""
        return False

    @property
    def teacher_decay(self) -> float | None:
        """Which of `ema.decays` a net that sets the target is an average by; None: there is no such net."""
        return None

    def tangent_share(self, alignment: int) -> float:
        """Of the samples of a micro-batch, at such an alignment, that which a derivative is taken of."""
        return float(self.takes_tangents)

    def cautions(self, images: int) -> list[str]:
        """What is allowed and seldom meant in a training of so many images, a sentence each."""
        return []

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

    def cautions(self, takes_tangents: bool) -> list[str]:
        """What is allowed and seldom meant under a method that does, or does not, take tangents of the net."""
        return []


@dataclass(frozen=True)
class SpaceConfig(Choice):
    """Settings of a sample space, beside what the manifest says.

    Attributes:
        UNIT: what a sample is called on the screen.
    """

    UNIT: ClassVar[str] = "images"


@dataclass(frozen=True)
class MetricConfig(Choice):
    """Settings of a metric."""
