"""The unit in which training state is kept, averaged and saved: a named slice of a flattened parameter."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParamSlice:
    """A contiguous slice of one flattened parameter, and live fp32 views of the states of that slice.

    Attributes:
        name: the parameter's name inside the network.
        shape: of the whole parameter.
        offset: where the slice starts in the flattened parameter.
        states: "weight" and, once the optimizer has them, "exp_avg" and "exp_avg_sq": flat tensors of one length.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    states: Mapping[str, Tensor]

    @property
    def numel(self) -> int:
        """Elements of the slice."""
        return self.states["weight"].numel()

    def even_part(self, part: int, parts: int) -> "ParamSlice | None":
        """The part-th of `parts` nearly equal slices of this one; None where that is empty."""
        start, stop = part * self.numel // parts, (part + 1) * self.numel // parts
        if start == stop:
            return None
        states = {key: value[start:stop] for key, value in self.states.items()}
        return ParamSlice(self.name, self.shape, self.offset + start, states)
