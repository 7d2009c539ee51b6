"""A net whose weights are a moving average of those in training, for losses that take their target from it."""

from typing import Any

import torch
from torch import Tensor

from imm_scale.parallel import world
from imm_scale.parallel.ema import ShardedEma, state_name


class Teacher:
    """The whole average on every rank: 4 bytes x parameters, and as much again sent twice in each step.

    Args:
        net: of the trained one's architecture, on its device; it takes the average's weights at each `refresh`, and no
            gradient.
        ema: has the average, in slices over the ranks.
        decay: which.
    """

    def __init__(self, net: Any, ema: ShardedEma, decay: float):
        self.net = net.requires_grad_(False).eval()
        self._slices, self._state = ema.saved_slices(), state_name(decay)
        parameters = dict(net.model.named_parameters())
        sizes = [parameter.numel() for parameter in parameters.values()]
        first = next(iter(parameters.values()))
        self._flat = torch.zeros(sum(sizes), dtype=torch.float32, device=first.device)
        parts = zip(parameters.items(), self._flat.split(sizes), strict=True)
        self._parts: dict[str, Tensor] = {}
        for (name, parameter), part in parts:
            parameter.data = part.view(parameter.shape)
            self._parts[name] = part
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the average as it is now; a collective. Each element is one rank's, so the sum over ranks is exact."""
        self._flat.zero_()
        for part in self._slices:
            self._parts[part.name].narrow(0, part.offset, part.numel).copy_(part.states[self._state])
        world.all_sum(self._flat)
