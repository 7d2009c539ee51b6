"""Draws of (s, t) for losses that hold for every s <= t: normal in log eta, with a share of groups at s = t.

log eta = log(sigma / alpha) is the logit of t on `ot_fm` and log tan of the angle on `vp_cosine`, so that logit-normal
times, and the log-normal noise levels of EDM and consistency models, are one family.

Legend: G groups. Times are fp64. Every draw is keyed by the group's number alone.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from imm_scale import rng
from imm_scale.choices import Passes, option
from imm_scale.data.batch import Batch
from imm_scale.errors import UserError
from imm_scale.methods.base import FlowMapMethod, FlowMapMethodConfig, GroupLosses
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import Interpolant

STRATUM = 4  # neighbouring groups among which a share in quarters is exact
_LEAST, _MOST = 2.0**-54, 1.0 - 2.0**-53  # keeps normals finite


@dataclass(frozen=True)
class TwoTimesConfig:
    """How s and t are drawn."""

    t: list[float] = option(  # noqa: RUF009 - copied for each instance
        [-0.4, 1.0],
        "Mean and standard deviation of log(sigma / alpha) at t; on ot_fm that is the logit of t.",
        length="[2, 2]",
    )
    s: list[float] | None = option(  # noqa: RUF009
        [-0.4, 1.0], "The same of s; null: s is method.t_min always, as in consistency training.", length="[2, 2]"
    )
    order: Literal["sort", "min"] = option("sort", "sort: t is the later of both draws; min: s is, at most, t.")
    equal: float = option(
        0.75, "Share of groups with s = t, on which the loss is that of flow matching.", range="[0, 1]"
    )
    equal_t: list[float] | None = option(  # noqa: RUF009
        None, "The same of t where s = t; null: drawn as everywhere.", length="[2, 2]"
    )
    min_gap: float = option(0.0, "Least t - s where s is not t.", range="[0, 1)")

    def validate(self) -> None:
        """Raises UserError where a value is out of its range."""
        for name in ("t", "s", "equal_t"):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or value[1] < 0.0):
                raise UserError(f"method.times.{name}={value} must be [mean, standard deviation >= 0]")


class TwoTimes(NamedTuple):
    """s <= t and where they are one by choice, each (G,)."""

    s: Tensor
    t: Tensor
    equal: Tensor


def is_stratified(share: float) -> bool:
    """Whether a share of groups comes out exactly among every `STRATUM` neighbours."""
    return float(STRATUM * share).is_integer()


def splits(share: float, alignment: int) -> bool:
    """Whether it is known beforehand how many groups of such a micro-batch have s before t."""
    return share < 1.0 and is_stratified(share) and alignment % STRATUM == 0


def order(share: float, group: Tensor, seed: int, alignment: int) -> tuple[Tensor | None, int]:
    """(G,) places with those first whose s is not t, and how many these are.

    Where that is not known beforehand, as the share is not in quarters or micro-batches cut strata, None and all.
    """
    if not splits(share, alignment):
        return None, len(group)
    return unequal_first(share, group, seed), len(group) - round(len(group) * share)


def draw_equal(share: float, group: Tensor, seed: int) -> Tensor:
    """(G,) whether s = t. Exactly so many of every four neighbours where the share is in quarters, else by chance.

    Which ones of four is drawn anew for each four: a fixed place in the batch would tie times to ranks.
    """
    if not is_stratified(share):
        return rng.uniform(seed, "equal", group)[:, 0] < share
    return (group - first_unequal(group // STRATUM, seed)) % STRATUM >= STRATUM - round(STRATUM * share)


def unequal_first(share: float, group: Tensor, seed: int) -> Tensor:
    """(G,) places of whole strata's groups, those first at which `draw_equal` says no: G (1 - share) of them."""
    strata = group[::STRATUM] // STRATUM
    places = torch.arange(STRATUM, device=group.device)
    turned = (first_unequal(strata, seed)[:, None] + places) % STRATUM
    index = STRATUM * torch.arange(len(strata), device=group.device)[:, None] + turned
    unequal = STRATUM - round(STRATUM * share)
    return torch.cat([index[:, :unequal].flatten(), index[:, unequal:].flatten()])


def first_unequal(stratum: Tensor, seed: int) -> Tensor:
    """(strata,) the first of each four groups' places, counted on around the four, at which s differs from t."""
    return (STRATUM * rng.uniform(seed, "equal", stratum)[:, 0]).long()


def draw(interp: Interpolant, config: TwoTimesConfig, group: Tensor, seed: int, t_min: float, t_max: float) -> TwoTimes:
    """s and t of each group within [t_min, t_max]."""
    u = rng.uniform(seed, "times", group, 2)
    t = _at(interp, config.t, u[:, 0], t_min, t_max)
    equal = draw_equal(config.equal, group, seed)
    if config.s is None:
        s = torch.full_like(t, t_min)
    else:
        other = _at(interp, config.s, u[:, 1], t_min, t_max)
        s = torch.minimum(t, other)
        t = torch.maximum(t, other) if config.order == "sort" else t
    if config.equal_t is not None:
        t = torch.where(equal, _at(interp, config.equal_t, u[:, 1], t_min, t_max), t)
    if config.min_gap:
        t = torch.where(equal, t, t.clamp_min(t_min + config.min_gap))
    return TwoTimes(torch.where(equal, t, torch.minimum(s, t - config.min_gap).clamp_min(t_min)), t, equal)


def _at(interp: Interpolant, normal: list[float], u: Tensor, t_min: float, t_max: float) -> Tensor:
    mean, deviation = normal
    return interp.eta_inverse(torch.exp(mean + deviation * standard_normal(u))).clamp(t_min, t_max)


def standard_normal(u: Tensor) -> Tensor:
    """Standard normals, finite, from uniforms in [0, 1) of any shape, by the inverse of their distribution."""
    return torch.special.ndtri(u.clamp(_LEAST, _MOST))


@dataclass(frozen=True)
class TwoTimesMethodConfig(FlowMapMethodConfig):
    """What methods share whose samples with s = t need fewer passes than the others."""

    times: TwoTimesConfig = field(default_factory=TwoTimesConfig)

    @property
    def passes(self) -> Passes:
        return self.passes_of(1.0)

    def cautions(self, images: int) -> list[str]:
        return [*super().cautions(images), *self.flow_map.cautions()]

    def passes_at(self, alignment: int) -> Passes:
        return self.passes_of(self._apart(alignment))

    def tangent_share(self, alignment: int) -> float:
        return self._apart(alignment) if self.takes_tangents else 0.0

    def _apart(self, alignment: int) -> float:
        """Share of samples taken for such with s before t."""
        return 1.0 - self.times.equal if splits(self.times.equal, alignment) else 1.0

    @abstractmethod
    def passes_of(self, apart: float) -> Passes:
        """Where this share of samples is taken for such with s before t."""

    def validate(self) -> None:
        super().validate()
        self.times.validate()


class TwoTimesMethod(FlowMapMethod):
    """A method of samples, each a group of its own, that takes those with s before t first where it can tell them."""

    config: Any

    def loss(self, net: FlowMap, batch: Batch, seed: int) -> GroupLosses:
        # Blocks of one sample differ in whether s = t, so samples of several cannot be told apart by it.
        alignment = batch.alignment if net.blocks == 1 else 1
        places, apart = order(self.config.times.equal, self.group(batch.ordinal), seed, alignment)
        x, label, ordinal = batch.x, batch.condition, batch.ordinal
        if places is None:
            return self.ordered_loss(net, x, label, ordinal, apart, seed)
        losses = self.ordered_loss(net, x[places], label[places], ordinal[places], apart, seed)
        back = torch.argsort(places)
        monitors = {name: values[back] for name, values in losses.monitors.items()}
        return GroupLosses(losses.loss_G[back], losses.t_G[back], monitors)

    @abstractmethod
    def ordered_loss(
        self, net: FlowMap, x: Tensor, label: Tensor, ordinal: Tensor, apart: int, seed: int
    ) -> GroupLosses:
        """Of x (N, ...), label and ordinal (N,), of which all but the first `apart` samples have s = t."""
