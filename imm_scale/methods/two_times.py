"""Draws of (s, t) for losses that hold for every s <= t: normal in log eta, with a share of groups at s = t.

log eta = log(sigma / alpha) is the logit of t on `ot_fm` and log tan of the angle on `vp_cosine`, so that logit-normal
times, and the log-normal noise levels of EDM and consistency models, are one family.

Legend: G groups. Times are fp64. Every draw is keyed by the group's number alone.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from imm_scale import rng
from imm_scale.choices import option
from imm_scale.errors import UserError
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
        if not 0.0 <= self.equal <= 1.0:
            raise UserError(f"method.times.equal={self.equal} must be in [0, 1]")
        if not 0.0 <= self.min_gap < 1.0:
            raise UserError(f"method.times.min_gap={self.min_gap} must be in [0, 1)")


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
    log_eta = mean + deviation * torch.special.ndtri(u.clamp(_LEAST, _MOST))
    return interp.eta_inverse(torch.exp(log_eta)).clamp(t_min, t_max)
