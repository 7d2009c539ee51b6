"""What every objective has in common: its result, and the draws that depend on the ordinals alone.

Legend: N samples, G groups of M particles, N = G M. `ordinal` is a sample's global ordinal on the clock, its group
ordinal // M; every draw follows from (seed, purpose, ordinal) and so from nothing a rank or a micro-batch decides.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from imm_scale import rng
from imm_scale.choices import MethodConfig, option
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMap, FlowMapConfig


@dataclass(frozen=True)
class FlowMapMethodConfig(MethodConfig):
    """What the methods share that train a flow map."""

    DEFAULT_T_MAX: ClassVar[dict[str, float]] = {"ot_fm": 1.0, "vp_cosine": 1.0}

    flow_map: FlowMapConfig = field(default_factory=FlowMapConfig)
    t_min: float = option(0.0, "Smallest time: 0 on latents, 0.006 on pixels.")
    t_max: float | None = option(None, "Largest time; null: 0.994 on ot_fm and 0.996 on vp_cosine for imm, else 1.")
    label_drop: float = option(0.1, "Share of samples trained without their label; guidance needs it above 0.")

    @property
    def has_second_time(self) -> bool:
        return self.flow_map.second_time != "none"

    def resolved(self, precision: str) -> Self:
        t_max = self.DEFAULT_T_MAX[self.flow_map.trajectory] if self.t_max is None else self.t_max
        return replace(self, t_max=t_max)

    def validate(self) -> None:
        self.flow_map.validate()
        t_max = 1.0 if self.t_max is None else self.t_max
        if not 0.0 <= self.t_min < t_max <= 1.0:
            raise UserError(f"times must satisfy 0 <= method.t_min={self.t_min} < method.t_max={t_max} <= 1")
        if not 0.0 <= self.label_drop < 1.0:
            raise UserError(f"method.label_drop={self.label_drop} must be in [0, 1)")


class GroupLosses(NamedTuple):
    """loss_G carries the gradient; t_G is where on the trajectory each group was."""

    loss_G: Tensor
    t_G: Tensor


class Objective(ABC):
    """A loss per group. `dropout` says whether the net has any."""

    particles: int
    label_drop: float
    dropout: bool

    @abstractmethod
    def __call__(self, flow_map: FlowMap, x: Tensor, label: Tensor, ordinal: Tensor, seed: int) -> GroupLosses:
        """Losses of whole groups.

        Args:
            flow_map: the map under training.
            x: (N, ...) clean samples, fp32 or fp64, scaled to standard deviation sigma_d.
            label: (N,) classes.
            ordinal: (N,) int64 global ordinals; the M of a group are neighbours.
            seed: the run's seed.
        """

    def group(self, ordinal: Tensor) -> Tensor:
        """(G,) global group numbers.

        Raises:
            UserError: samples that are not whole groups. Ordinals on a GPU are not looked at: that would wait for it.
        """
        if ordinal.shape[0] % self.particles:
            raise UserError(f"{ordinal.shape[0]} samples are not whole groups of particles={self.particles}")
        group = ordinal.view(-1, self.particles) // self.particles
        readable = ordinal.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and not torch.equal(group, group[:, :1].expand_as(group)):
            split = int(group[(group != group[:, :1]).any(dim=1)][0, 0])
            raise UserError(
                f"group {split} is not whole on this rank: its {self.particles} particles must be neighbours"
            )
        return group[:, 0]

    def drop_labels(self, flow_map: FlowMap, label: Tensor, ordinal: Tensor, seed: int) -> Tensor:
        """Labels with a share `label_drop` replaced by the null label, decided per sample, once for all passes."""
        if self.label_drop == 0.0:
            return label
        assert flow_map.null_label is not None, "label drop needs a null label"
        dropped = rng.uniform(seed, "label_drop", ordinal)[:, 0] < self.label_drop
        return torch.where(dropped, flow_map.null_label, label)

    def dropout_key(self, ordinal: Tensor, seed: int) -> Tensor | None:
        """(N,) keys of the dropout masks, shared by both branches; None without dropout."""
        return rng.random_bits(seed, "dropout", ordinal) if self.dropout else None


def prior_noise(flow_map: FlowMap, x: Tensor, ordinal: Tensor, seed: int) -> Tensor:
    """eps ~ N(0, sigma_d^2 I) of the shape and dtype of x, keyed by sample."""
    return flow_map.sigma_data * rng.normal(seed, "noise", ordinal, tuple(x.shape[1:])).to(x.dtype)
