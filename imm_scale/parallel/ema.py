"""Moving averages of the weights, kept as the same slices the optimizer keeps: a step needs no communication."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from imm_scale.parallel.param_slice import ParamSlice


def state_name(decay: float) -> str:
    """The name of a moving average among the states of a checkpoint."""
    return f"ema-{decay:g}"


class ShardedEma:
    """One fp32 average per decay over this rank's slices, starting at the current weights.

    That is 4 bytes x parameters / ranks for each, at every ZeRO stage: those of stage 0 are even parts.

    Args:
        slices: the slices this rank owns; their weights are live.
        decays: which averages there are.
        power: what a decay is raised to for one update; 1 where decays are meant per step.
    """

    def __init__(self, slices: Sequence[ParamSlice], decays: Sequence[float], power: float = 1.0):
        self.slices = list(slices)
        self._weights = [part.states["weight"] for part in slices]
        self.averages: dict[float, list[Tensor]] = {
            decay: [torch.empty_like(weight) for weight in self._weights] for decay in decays
        }
        self._power = power
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Sets every average to the current weights."""
        for averages in self.averages.values():
            for average, weight in zip(averages, self._weights, strict=True):
                average.copy_(weight)

    @torch.no_grad()
    def update(self) -> None:
        """average <- d * average + (1 - d) * weight with d = decay^power; call it after each step that was taken."""
        if not self._weights:
            return  # in a world larger than the net the last ranks own nothing
        for decay, averages in self.averages.items():
            torch._foreach_lerp_(averages, self._weights, 1.0 - decay**self._power)

    def saved_slices(self) -> list[ParamSlice]:
        """This rank's slices with the averages among their states: what a checkpoint keeps of them."""
        return [replace(part, states={**part.states, **self.states(index)}) for index, part in enumerate(self.slices)]

    def states(self, index: int) -> dict[str, Tensor]:
        """{state name: flat fp32 average} of the index-th slice."""
        return {state_name(decay): averages[index] for decay, averages in self.averages.items()}
