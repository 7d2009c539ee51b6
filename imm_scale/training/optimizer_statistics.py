"""How the optimizer is doing, from each rank's own slices: sums that ranks add up, so nothing is gathered."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from imm_scale.parallel.ema import ShardedEma

Record = dict[str, float]
_FIXED = 5  # sums before those of the averages


def _square_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares over all tensors, fp64."""
    norms = torch._foreach_norm(list(tensors))
    return torch.stack(list(norms)).double().square().sum() if norms else torch.zeros((), dtype=torch.float64)


class Gauges:
    """Update norm, distance of each average to the weights, and Adam's second moment against its epsilon.

    `remember` before a step whose update is to be measured keeps a copy of this rank's weights until `sums`.

    Args:
        ema: averages and the slices they follow.
        beta2, eps: of Adam.
    """

    def __init__(self, ema: ShardedEma, beta2: float, eps: float):
        self._ema, self._beta2, self._eps = ema, beta2, eps
        self._weights = [shard.states["weight"] for shard in ema.shards]
        self._second = [shard.states["exp_avg_sq"] for shard in ema.shards]
        self._before: list[Tensor] | None = None

    @torch.no_grad()
    def remember(self) -> None:
        self._before = [weight.clone() for weight in self._weights]

    @torch.no_grad()
    def sums(self, optimizer_steps: int) -> Tensor:
        """(5 + averages,) fp64, to be added over ranks: squares of update and weights, elements, those of them whose
        gradient is below epsilon, second moments, and squares of each average's distance.

        Args:
            optimizer_steps: Adam's counter, for the correction of the second moment's bias.
        """
        update = torch.full((), math.nan, dtype=torch.float64)
        if self._before is not None:
            update = _square_norm(torch._foreach_sub(self._weights, self._before))
            self._before = None
        # sqrt(v / bias) <= eps, where Adam's step is less than half of what it would be without epsilon.
        bias = 1.0 - self._beta2 ** max(optimizer_steps, 1)
        small = sum((int((v <= self._eps**2 * bias).sum()) for v in self._second), 0)
        total = sum((float(v.sum(dtype=torch.float64)) for v in self._second), 0.0) / bias
        elements = sum(weight.numel() for weight in self._weights)
        distances = [
            _square_norm(torch._foreach_sub(averages, self._weights)) for averages in self._ema.averages.values()
        ]
        fixed = [float(update), float(_square_norm(self._weights)), elements, small, total]
        return torch.tensor([*fixed, *map(float, distances)], dtype=torch.float64)

    def record(self, sums: Sequence[float]) -> Record:
        """From the sums over all ranks."""
        update, weights, elements, small, second = sums[:_FIXED]
        weight_norm = math.sqrt(weights)
        distances = {
            f"ema_distance_{decay:g}": math.sqrt(square) / max(weight_norm, 1e-30)
            for decay, square in zip(self._ema.averages, sums[_FIXED:], strict=True)
        }
        return {
            **({} if math.isnan(update) else {"update_norm": math.sqrt(update)}),
            "weight_norm": weight_norm,
            "adam_below_eps": small / elements,
            "adam_rms_over_eps": math.sqrt(second / elements) / max(self._eps, 1e-30),
            **distances,
        }
