"""The passes of a skipped step once more, to find the ranks whose gradients were not finite.

Once ranks are mixed a NaN is everywhere, and every ZeRO stage mixes them as soon as it can. So a step that is taken
looks at nothing but the norm, and only one that was skipped pays for the question, with a second run of its passes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from imm_scale.data.loader import Batch
from imm_scale.parallel.deepspeed_engine import Engine
from imm_scale.parallel.loss_scale import LossScale


class _Look:
    """A gradient hook. It notes on the device whether it ever saw Inf or NaN, and passes on NaN in any case."""

    def __init__(self, device: torch.device):
        self.all_finite = torch.ones((), dtype=torch.bool, device=device)

    def __call__(self, gradient: Tensor) -> Tensor:
        self.all_finite.logical_and_(torch.isfinite(gradient).all())
        return torch.full_like(gradient, math.nan)


def gradient_is_bad(engine: Engine, micro_batches: Sequence[Batch], loss_scale: float | None) -> bool:
    """Whether a gradient of this rank alone is not finite; a collective, to be called after a step was skipped.

    Weights have not changed and every draw follows from the ordinals, so these are the passes of the skipped step.
    They are skipped like it, whatever they find, for the hooks pass on NaN: weights, moments, counters and the loss
    scale stay as they are.

    Args:
        micro_batches: of the skipped step.
        loss_scale: the factor it ran with, None but for fp16.
    """
    look = _Look(engine.device)
    hooks = [parameter.register_hook(look) for parameter in engine.parameters]
    previous, engine.loss_scale = engine.loss_scale, None if loss_scale is None else LossScale(loss_scale)
    try:
        result = engine.step(micro_batches, lr=0.0)
    finally:
        engine.loss_scale = previous
        for hook in hooks:
            hook.remove()
    assert result.skipped, "gradients of NaN were applied"
    return not bool(look.all_finite)
