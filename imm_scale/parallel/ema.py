"""Moving averages of the weights, kept as the same slices the optimizer keeps: a step needs no communication."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from imm_scale.parallel.param_slice import ParamSlice

WARMUP_WIDTH = 0.10  # of a warm-up's averages, relative to what has been trained: EDM2's wider one


def state_name(decay: float) -> str:
    """The name of a moving average among the states of a checkpoint: all the digits that tell two decays apart."""
    return f"ema-{float(decay)!r}"


def older_state_name(decay: float) -> str:
    """The name that version 0.1 gave it: six digits, which are not always enough."""
    return f"ema-{decay:g}"


def power_function_exponent(relative_width: float) -> float:
    """gamma of the average whose weights grow as t^gamma, from its standard deviation over the time trained so far.

    Karras et al. 2023 (arXiv 2312.02696), appendix C: relative_width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a
    cubic whose greatest root it is. 0.05 and 0.10 come to 16.97 and 6.94.
    """
    inverse = relative_width**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def warm_decay(share: float) -> float:
    """The decay of one update of a power-function average (eq. 127 there): (1 - share)^(gamma + 1).

    Args:
        share: what the step has added to all images seen so far; 1 at the first step, which leaves nothing of before.
    """
    return float((1.0 - share) ** (_WARMUP_EXPONENT + 1.0))


_WARMUP_EXPONENT = power_function_exponent(WARMUP_WIDTH)


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
    def update(self, share: float = 0.0) -> None:
        """average <- d * average + (1 - d) * weight with d = decay^power; call it after each step that was taken.

        Args:
            share: for averages that start short, what the step has added to all images seen so far: d is at most
                `warm_decay(share)`, so the average reaches back a tenth of the training until its decay is longer.
        """
        if not self._weights:
            return  # in a world larger than the net the last ranks own nothing
        for decay, averages in self.averages.items():
            torch._foreach_lerp_(averages, self._weights, 1.0 - min(decay**self._power, warm_decay(share)))

    def saved_slices(self) -> list[ParamSlice]:
        """This rank's slices with the averages among their states: what a checkpoint keeps of them."""
        return [replace(part, states={**part.states, **self.states(index)}) for index, part in enumerate(self.slices)]

    def states(self, index: int) -> dict[str, Tensor]:
        """{state name: flat fp32 average} of the index-th slice."""
        return {state_name(decay): averages[index] for decay, averages in self.averages.items()}
