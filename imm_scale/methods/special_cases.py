"""Two methods that IMM contains: only the times differ."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imm_scale import rng
from imm_scale.choices import option
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.imm import ImmConfig, InductiveMomentMatching
from imm_scale.registry import register_method

_CONSISTENCY_KERNELS = ("energy", "pseudo_huber")


@dataclass(frozen=True)
class ConsistencyConfig(ImmConfig):
    name: str = option("consistency", "")

    @property
    def jumps_to_data_only(self) -> bool:
        return True

    def validate(self) -> None:
        super().validate()
        if self.particles != 1 or self.kernel not in _CONSISTENCY_KERNELS:
            raise UserError(
                f"method.name=consistency with particles={self.particles} and kernel={self.kernel}: it is the case of "
                "method.particles=1 and method.kernel=energy or pseudo_huber"
            )


@dataclass(frozen=True)
class GmmnConfig(ImmConfig):
    name: str = option("gmmn", "")

    @property
    def why_not_blocks(self) -> str:
        return (
            "one jump from noise matches what the blocks of a group have in common, and their contexts differ: without "
            "a time close by nothing ties a block to its own"
        )

    def check_sampler(self, sampler: str, steps: Sequence[int]) -> None:
        if max(steps, default=1) > 1:
            raise UserError(
                f"{max(steps)} steps of a net trained by method.name=gmmn: it learns the jump from noise alone; take 1 "
                "step (sampling.steps=[1] and evaluation.steps=[1])"
            )

    def validate(self) -> None:
        super().validate()
        if self.logit_normal:
            raise UserError(
                f"method.logit_normal={self.logit_normal}: method.name=gmmn has t = t_max always: leave it at []"
            )


@register_method("consistency")
class ConsistencyTraining(InductiveMomentMatching):
    """IMM with one particle, s fixed at t_min and the energy or pseudo-Huber kernel (Lemma 1).

    The loss is 2 w(t) ||f_{s,t}(x_t) - f_{s,r}(x_r)||^2 with the energy kernel; the 2 is the V-statistic's.
    """

    Config = ConsistencyConfig

    def draw_times(self, flow_map: FlowMap, group: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        t = c.t_min + (c.t_max - c.t_min) * c.place(rng.uniform(seed, "times", group)[:, 0])
        s = torch.full_like(t, c.t_min)
        return s, self.map_r(flow_map, s, t), t


@register_method("gmmn")
class GenerativeMomentMatching(InductiveMomentMatching):
    """IMM with t = t_max and s = r = t_min: a generative moment matching network (app G.3), one jump from noise.

    The target is the interpolant of the data at t_min, exact; the weight of eq 13 is a constant factor.
    """

    Config = GmmnConfig

    def draw_times(self, flow_map: FlowMap, group: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.full(group.shape, self.config.t_max, dtype=torch.float64, device=group.device)
        s = torch.full_like(t, self.config.t_min)
        return s, s, t
