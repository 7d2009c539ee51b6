"""Which times a sampler visits (app I.2): decreasing grids from t_max to t_min, fp64, of steps + 1 points."""

import itertools

import torch
from torch import Tensor

from imm_scale.errors import UserError
from imm_scale.methods.probability_path import Interpolant

GRIDS = ("uniform", "edm", "eta_1.4")
_RHO = 7.0
_MIDDLE_ETA = 1.4  # of the paper's two-step grid


def explicit_grid(text: str, steps: int) -> Tensor:
    """The times of "0.994,0.5,0".

    Raises:
        UserError: times that do not decrease within [0, 1], or another number of steps.
    """
    try:
        times = [float(item) for item in text.split(",")]
    except ValueError as error:
        raise UserError(f"grid={text!r} is neither {', '.join(GRIDS)} nor a list of times as in 0.994,0.5,0") from error
    if not (times[0] <= 1.0 and times[-1] >= 0.0 and all(t > s for t, s in itertools.pairwise(times))):
        raise UserError(f"grid={text!r} must decrease, from at most 1 to at least 0")
    if len(times) != steps + 1:
        raise UserError(f"grid={text!r} has {len(times) - 1} steps, not {steps}: use --steps {len(times) - 1}")
    return torch.tensor(times, dtype=torch.float64)


def time_grid(interp: Interpolant, kind: str, steps: int, t_min: float, t_max: float) -> Tensor:
    """The grid of that kind, (steps + 1,) fp64.

    Args:
        kind: `uniform` in t; `edm`, even in eta^(1/7); `eta_1.4`, two steps that meet at eta = 1.4; or the times
            themselves, as in "0.994,0.5,0".

    Raises:
        UserError: unknown kind, `eta_1.4` with other than 2 steps, `edm` from t_max = 1 where eta is infinite, or times
            that do not decrease.
    """
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1")
    if "," in kind:
        return explicit_grid(kind, steps)
    if not 0.0 <= t_min < t_max <= 1.0:
        raise UserError(f"a grid must decrease: t_max={t_max} must lie above t_min={t_min}, both in [0, 1]")
    ends = torch.tensor([t_max, t_min], dtype=torch.float64)
    if kind == "uniform":
        return torch.linspace(t_max, t_min, steps + 1, dtype=torch.float64)
    if kind == "edm":
        if t_max >= 1.0:
            raise UserError(f"the edm grid needs t_max below 1, got {t_max}: use grid=uniform")
        first, last = interp.eta(ends) ** (1.0 / _RHO)
        etas = (first + torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64) * (last - first)) ** _RHO
        inner = interp.eta_inverse(etas[1:-1])
        return torch.cat([ends[:1], inner, ends[1:]])
    if kind == "eta_1.4":
        if steps != 2:
            raise UserError(f"grid=eta_1.4 has 2 steps, not {steps}: use grid=uniform or grid=auto")
        middle = interp.eta_inverse(torch.tensor([_MIDDLE_ETA], dtype=torch.float64))
        if not t_min < float(middle) < t_max:
            raise UserError(
                f"grid=eta_1.4 meets at t={float(middle):.4f}, outside {t_min} to {t_max}: use grid=uniform"
            )
        return torch.cat([ends[:1], middle, ends[1:]])
    raise UserError(f"grid {kind!r} is unknown; choose one of {', '.join(GRIDS)}")
