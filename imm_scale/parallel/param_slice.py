"""The unit in which training state is kept, averaged and saved: a named slice of a flattened parameter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")

State = TypeVar("State", Tensor, tuple[Tensor, ...])


@dataclass(frozen=True)
class ParamSlice(Generic[State]):
    """A contiguous slice of one flattened parameter with the states of that slice, flat and in fp32.

    Attributes:
        name: the parameter's name inside the network.
        shape: of the whole parameter.
        offset: where the slice starts in the flattened parameter.
        states: "weight" and, once the optimizer has them, "exp_avg" and "exp_avg_sq", all of one length: live views,
            or, of a copy in host memory, the consecutive parts of each that chunks of that memory hold.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    states: Mapping[str, State]

    @property
    def numel(self: "ParamSlice[Tensor]") -> int:
        """Elements of the slice."""
        return self.states["weight"].numel()

    def even_part(self: "ParamSlice[Tensor]", part: int, parts: int) -> "ParamSlice[Tensor] | None":
        """The part-th of `parts` nearly equal slices of this one; None where that is empty."""
        start, stop = part * self.numel // parts, (part + 1) * self.numel // parts
        if start == stop:
            return None
        states = {key: value[start:stop] for key, value in self.states.items()}
        return ParamSlice(self.name, self.shape, self.offset + start, states)
