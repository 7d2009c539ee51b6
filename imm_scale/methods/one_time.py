"""Draws of t for losses that start from a single time: uniform, or logit-normal.

Esser et al. (arXiv 2403.03206, section 3.1) draw the times of flow matching so: more of them in the middle, where most
is to be learned, and fewer at both ends. IMM is published with uniform times.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imm_scale.choices import option
from imm_scale.errors import UserError
from imm_scale.methods.base import FlowMapMethodConfig
from imm_scale.methods.two_times import standard_normal


@dataclass(frozen=True)
class OneTimeConfig(FlowMapMethodConfig):
    """What methods share that draw t by itself."""

    logit_normal: list[float] = option(  # noqa: RUF009 - copied for each instance
        [],
        "Mean and standard deviation of the logit of t, as [0, 1] of Stable Diffusion 3; [] draws t uniformly.",
        length="[0, 2]",
    )
    replicas: int = option(
        1,
        "model.branch=mlp: branches of each sample, with noise and times of their own, beside its one clean stream.",
        range="[1, inf)",
    )

    def validate(self) -> None:
        super().validate()
        numbers = self.logit_normal
        if numbers and not (len(numbers) == 2 and all(map(math.isfinite, numbers)) and numbers[1] > 0):
            raise UserError(
                f"method.logit_normal={numbers} must be a mean and a standard deviation above 0, as [0, 1], or []"
            )

    def place(self, u: Tensor) -> Tensor:
        """Where t is between t_min (0) and t_max (1), (G,), from uniforms (G,)."""
        if not self.logit_normal:
            return u
        mean, deviation = self.logit_normal
        return torch.sigmoid(mean + deviation * standard_normal(u))
