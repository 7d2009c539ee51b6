"""How the optimizer is doing, from each rank's own slices: sums that ranks add up, so nothing is gathered.

All sums are taken on the device, a multi-tensor kernel over all slices at a time, and none is read here.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from imm_scale.parallel.ema import ShardedEma

Record = dict[str, float]
_FIXED = 5  # sums before those of the averages


def _sum_of_norms(tensors: Sequence[Tensor], order: int) -> Tensor:
    """Sum over all tensors of their norms of that order to the power of it, a scalar in fp64."""
    norms = torch._foreach_norm(list(tensors), order, dtype=torch.float64)
    return torch.stack(list(norms)).pow(order).sum()


class OptimizerStatistics:
    """Update norm, distance of each average to the weights, and Adam's second moment against its epsilon.

    `remember` before a step whose update is to be measured keeps a copy of this rank's weights until `sums`.

    Args:
        ema: averages and the slices they follow.
        beta2, eps: of Adam.
    """

    def __init__(self, ema: ShardedEma, beta2: float, eps: float):
        self._ema, self._beta2, self._eps = ema, beta2, eps
        self._weights = [shard.states["weight"] for shard in ema.slices]
        self._second = [shard.states["exp_avg_sq"] for shard in ema.slices]
        self._elements = sum(weight.numel() for weight in self._weights)
        self._before: list[Tensor] | None = None

    @torch.no_grad()
    def remember(self) -> None:
        if self._weights:
            self._before = [torch.empty_like(weight) for weight in self._weights]
            torch._foreach_copy_(self._before, self._weights)

    @torch.no_grad()
    def sums(self, optimizer_steps: int) -> Tensor:
        """(5 + averages,) fp64 beside the weights, to be added over ranks: squares of update and weights, elements,
        those of them whose gradient is below epsilon, second moments, and squares of each average's distance.

        Args:
            optimizer_steps: Adam's counter, for the correction of the second moment's bias.
        """
        before, self._before = self._before, None
        if not self._weights:  # in a world larger than the net the last ranks own nothing
            return torch.zeros(_FIXED + len(self._ema.averages), dtype=torch.float64)
        bias = 1.0 - self._beta2 ** max(optimizer_steps, 1)
        weight = _sum_of_norms(self._weights, 2)
        return torch.stack(
            [
                torch.full_like(weight, math.nan) if before is None else self._square_distance(before),
                weight,
                torch.full_like(weight, self._elements),
                self._below_epsilon(bias),
                _sum_of_norms(self._second, 1) / bias,  # they are not negative
                *map(self._square_distance, self._ema.averages.values()),
            ]
        )

    def _square_distance(self, others: list[Tensor]) -> Tensor:
        """Of the weights from others of the same shapes."""
        return _sum_of_norms(torch._foreach_sub(self._weights, others), 2)

    def _below_epsilon(self, bias: float) -> Tensor:
        """Elements where sqrt(v / bias) <= eps: there Adam's step is less than half of what it would be without."""
        bound = self._eps**2 * bias
        above = torch._foreach_clamp_min(self._second, bound)
        torch._foreach_sub_(above, bound)
        torch._foreach_sign_(above)
        return self._elements - _sum_of_norms(above, 1)

    def record(self, sums: Sequence[float]) -> Record:
        """From the sums over all ranks."""
        update, weights, elements, small, second = sums[:_FIXED]
        weight_norm = math.sqrt(weights)
        distances = {
            f"ema_distance_{decay!r}": math.sqrt(square) / max(weight_norm, 1e-30)
            for decay, square in zip(self._ema.averages, sums[_FIXED:], strict=True)
        }
        return {
            **({} if math.isnan(update) else {"update_norm": math.sqrt(update)}),
            "weight_norm": weight_norm,
            "adam_below_eps": small / elements,
            "adam_rms_over_eps": math.sqrt(second / elements) / max(self._eps, 1e-30),
            **distances,
        }
